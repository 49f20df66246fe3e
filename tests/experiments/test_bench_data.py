"""The benchmark of the data modules: that its contestants read the same, that it times what it says, that it runs."""

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ImageTextDataModule
from experiments.bench_data import (
    RATE,
    RESUMED,
    WANTED,
    Bare,
    Bench,
    chosen,
    decode_bare,
    main,
    make_pictures,
    make_videos,
    measure,
    our_clips,
    places,
    read_decord,
    read_pyav,
    webdataset,
)

SIDE, RESOLUTION, N, SHARDS = 64, 32, 12, 2


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    make_pictures(tmp_path / "pictures", SIDE, N, SHARDS)
    return sorted(str(path) for path in (tmp_path / "pictures").glob("*.tar"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("made") / "clips"
    make_videos(folder, n=2, seconds=1.5)
    return str(folder)


def test_bare_decodes_every_picture_at_the_scale_of_ours(shards: list[str]) -> None:
    items = places(shards, RESOLUTION)
    assert len(items) == N
    assert all(min(decode_bare(*item).size) == RESOLUTION for item in items)  # half of SIDE, by the JPEG decoder
    assert sorted(islice((i for batch in Bare(items, decode_bare).loader(4, 0) for i in batch), N)) == list(range(N))


def test_webdataset_reads_the_pictures_of_ours(shards: list[str]) -> None:
    pytest.importorskip("webdataset")
    ours = {}
    for batch in islice(ImageTextDataModule(shards, 4, RESOLUTION, random_caption=False).train_dataloader(), N // 4):
        ours |= dict(zip(batch["key"], zip(batch["image"], batch["text"], strict=True), strict=True))
    theirs = {}
    for images, texts, keys in islice(webdataset(shards, RESOLUTION, 4, 0), N // 4):
        theirs |= dict(zip(keys, zip(images, texts, strict=True), strict=True))
    assert ours.keys() == theirs.keys() and len(ours) == N
    for key, (image, text) in theirs.items():
        assert image.shape == ours[key][0].shape == (3, RESOLUTION, RESOLUTION) and text == ours[key][1]
        # decoded at another scale, resized by another filter
        assert (image * 255 - ours[key][0]).abs().mean() < 8


def test_decord_and_pyav_read_the_frames_of_ours(videos: str) -> None:
    bench = Bench(frames=4, clip_resolution=84, clip_batch=2)
    items = chosen(bench, videos, batches=2)
    batches = list(islice(our_clips(bench, videos, 0).train_dataloader(), 2))
    ours = torch.cat([batch["video"] for batch in batches])
    assert len(items) == len(ours) == 4
    for (path, indices), video, key in zip(items, ours, sum([batch["key"] for batch in batches], []), strict=True):
        frames = read_decord(path, indices)
        assert Path(path).stem == Path(key).stem and frames.shape == (4, 336, 596, 3)
        assert np.abs(frames.astype(int) - read_pyav(path, indices)).mean() < 3
        small = np.stack([np.asarray(Image.fromarray(frame).resize((149, 84))) for frame in frames])[:, :, 32:116]
        assert np.abs(small.astype(int) - video.permute(1, 2, 3, 0).numpy()).mean() < 4


def test_made_videos_move(videos: str) -> None:
    frames = read_decord(f"{videos}/mp4/0.mp4", list(range(0, RATE, 3))).astype(int)
    assert np.abs(np.diff(frames, axis=0)).mean() > 3


@pytest.mark.parametrize("turns, read", [(3, 2 * 2 + 3 * 2), (0, 1)])
def test_measured_are_whole_turns_after_the_first_two(turns: int, read: int) -> None:
    given = []

    def loader() -> Iterator[int]:
        for i in range(100):
            given.append(i)
            yield i

    first, speed = measure(loader, turn=2, seconds=math.inf, turns=turns)
    assert len(given) == read and first > 0 and (speed > 0) == (turns > 0)


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.json"
    made = ["sides=[32,64]", "resolutions=[16,32]", "pictures=8", "videos=1", "video_seconds=1"]
    short = ["frames=4", "clip_resolution=16", "batch_size=2", "clip_batch=1", "workers=1", "rounds=1"]
    main([*made, *short, "seconds=0.01", "clip_turns=1", "peers=false", f"output={path}"])
    rows = json.loads(path.read_text())["rows"]
    pictures = ["ours", "bare limit", RESUMED]
    assert [row["name"] for row in rows] == [*pictures, *pictures, "ours", "decord", "PyAV", RESUMED]
    assert len({row["group"] for row in rows}) == 3
    for row in rows:
        assert row["first"] > 0
        assert row["name"] == RESUMED or row["ratio"] > 0 and min(row["rounds"]) > 0
        assert row["met"] == (row["ratio"] >= WANTED[row["name"]] if row["name"] in WANTED else None)
    shown = capsys.readouterr().out
    assert shown.count(", wanted ") == 4 and shown.count("| ours |") == 3


def test_too_few_shards_for_webdataset_are_said(shards: list[str]) -> None:
    with pytest.raises(SystemExit, match="2 shards for 3 workers"):
        main([f"images={Path(shards[0]).parent}", "workers=3"])
