"""Video: what a batch holds, that no caption can be in it, what is skipped, exact resume."""

import json
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import Curriculum, VideoDataModule
from datamodules.clips import Keep

DEMO = Path(__file__).parents[2] / "experiments" / "demo" / "clips"
CANARY = "canary-in-the-caption"


def make(root: Path, **options: Any) -> VideoDataModule:
    given: dict[str, Any] = {
        "batch_size": 2,
        "frames": 4,
        "resolution": 16,
        "curriculum": Curriculum(steps=10),
    } | options
    return VideoDataModule(root, **given)


def batches(module: VideoDataModule, n: int) -> list[dict[str, Any]]:
    return list(islice(iter(module.train_dataloader()), n))


def test_a_batch_holds_clips_rates_and_keys(tmp_path: Path, make_webvid: Any) -> None:
    (batch,) = batches(make(make_webvid(tmp_path, 3)), 1)
    assert set(batch) == {"video", "fps", "key", "seed", "skipped"}
    assert batch["video"].shape == (2, 3, 4, 16, 16) and batch["video"].dtype == torch.uint8
    assert batch["fps"].shape == (2,) and batch["fps"].dtype == torch.float32
    assert (3 < batch["fps"]).all() and (batch["fps"] <= 24.001).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_no_caption_can_reach_a_batch(tmp_path: Path, make_webvid: Any, workers: int) -> None:
    root = make_webvid(tmp_path, 2, name=CANARY, extra=("missing",))
    assert CANARY in (root / "table.csv").read_text()
    module = make(root, workers=workers)
    dataset = module.train_dataloader().loader.dataset
    seen = [dataset, module.source().clips, *batches(module, 3), module.preview(2)]
    assert "missing" in repr(module.source())  # the search below would find what is there
    for thing in seen:
        assert CANARY not in repr(thing) and CANARY.encode() not in pickle.dumps(thing)
    assert CANARY not in repr(module.source()) and CANARY not in repr(module.skipped)


@pytest.fixture
def make_source(tmp_path: Path, make_timed: Any, make_v2d: Any) -> Any:
    """make_source(kind): a source of four clips whose captions, wherever the kind has any, are the canary."""

    def make(kind: str) -> Path:
        root = tmp_path / kind
        paths = [make_timed(root / "videos" / f"{i}.mp4", list(range(48))) for i in range(4)]
        if kind == "folder":
            (root / "videos" / "0.txt").write_text(CANARY)
            return root
        if kind == "shards":
            meta = {"caption": CANARY, "status": "success", "url": CANARY, "yt_meta_dict": {"info": {"title": CANARY}}}
            members = [{"mp4": path.read_bytes(), "txt": CANARY.encode(), "json": meta} for path in paths]
            failed = {"txt": CANARY.encode(), "json": {**meta, "status": CANARY, "error_message": CANARY}}
            broken = {"mp4": b"x", "json": {**meta, "status": f"of {CANARY}"}}
            make_v2d(root / "00000.tar", {"0": members[0], "1": members[1], "2": failed})
            make_v2d(root / "00001.tar", {"3": members[2], "4": members[3], "5": broken})
            return root
        clips = [{"clip_id": "c", "text": CANARY, "span": ["00:00:00.500", "00:00:01.500"]}]
        lines = [{"video_id": f"{i}", "url": CANARY, "title": CANARY, "clip": clips} for i in range(4)]
        (root / "list.jsonl").write_text("\n".join([*map(json.dumps, lines), f'{{"{CANARY}": 1}}', CANARY]))
        return root / "list.jsonl"

    return make


@pytest.mark.parametrize("kind", ["folder", "shards", "list"])
def test_every_kind_of_source_gives_the_same_batches_and_no_caption(make_source: Any, kind: str) -> None:
    source = make_source(kind)
    module = make(source, batch_size=3)
    dataset = module.train_dataloader().loader.dataset
    first = batches(module, 4)
    assert set(first[0]) == {"video", "fps", "key", "seed", "skipped"} and first[0]["video"].shape == (3, 3, 4, 16, 16)
    for thing in (dataset, module.source(), *first, module.preview(2), module.skipped):
        assert CANARY not in repr(thing) and CANARY.encode() not in pickle.dumps(thing)
    for workers in (1, 2):
        for a, b in zip(batches(make(source, batch_size=3, workers=workers), 4), first, strict=True):
            assert a["key"] == b["key"] and torch.equal(a["video"], b["video"]) and torch.equal(a["fps"], b["fps"])


def test_failures_of_shards_are_counted_and_shards_have_sizes(make_source: Any) -> None:
    module = make(make_source("shards"), batch_size=10)
    for batch in batches(module, 2):
        assert set(module.on_before_batch_transfer(batch, 0)["key"]) == {"0", "1", "3", "4"}
    assert module.source().sizes == [2, 3]
    assert module.skipped["video2dataset: failed"] >= 3  # once in the list, and each time it is met


def test_achieved_rates_are_counted(tmp_path: Path, make_webvid: Any) -> None:
    module = make(make_webvid(tmp_path, 2, frames=48), batch_size=8, curriculum=Curriculum(steps=4))
    module.preview(2)
    assert not module.rates
    rates = [fps for batch in batches(module, 5) for fps in module.on_before_batch_transfer(batch, 0)["fps"].tolist()]
    assert module.rates.total() == 40 and set(module.rates) <= set(range(2, 25))
    assert sum(rate * n for rate, n in module.rates.items()) / 40 == pytest.approx(sum(rates) / 40, abs=0.5)


def test_clips_that_are_not_kept_are_replaced_and_counted(tmp_path: Path, make_webvid: Any, make_timed: Any) -> None:
    root = make_webvid(tmp_path, 3, frames=48)
    make_timed(root / "mp4" / "001.mp4", [0] + [*range(2, 96, 2)])  # stripes that jump
    module = make(root, batch_size=12, keep=Keep(min_motion=1.0, max_cut=10.0), curriculum=Curriculum(1, f_min=20))
    (batch,) = batches(module, 1)
    assert set(module.on_before_batch_transfer(batch, 0)["key"]) == {"000", "002"}
    assert module.skipped["the clip holds a cut"] >= 3
    still = make(root, keep=Keep(min_motion=200.0))
    with pytest.raises(RuntimeError, match="the clip is static"):
        batches(still, 1)


def test_clips_are_chosen_by_lists_of_keys(tmp_path: Path, make_webvid: Any) -> None:
    root = make_webvid(tmp_path / "clips", 4)
    keys = [clip.key for clip in make(root).source().clips]
    (tmp_path / "some.txt").write_text("\n".join(keys[:3]))
    (tmp_path / "held_out.txt").write_text(f"{keys[1]}  # held out\n")
    lists = {"only": str(tmp_path / "some.txt"), "without": str(tmp_path / "held_out.txt")}
    assert [clip.key for clip in make(root, **lists).source().clips] == [keys[0], keys[2]]
    assert {key for batch in batches(make(root, **lists), 8) for key in batch["key"]} == {keys[0], keys[2]}
    with pytest.raises(ValueError, match="leave no clip"):
        make(root, only=lists["without"], without=lists["without"]).setup()


def test_rates_fall_with_the_curriculum(tmp_path: Path, make_webvid: Any) -> None:
    module = make(make_webvid(tmp_path, 2, frames=48), batch_size=8, curriculum=Curriculum(steps=4))
    rates = [batch["fps"].mean().item() for batch in batches(module, 6)]
    assert rates[0] > 14 and rates[-1] < 12


def test_the_curriculum_goes_on_where_it_was_with_other_ranks_and_batches(tmp_path: Path, make_webvid: Any) -> None:
    """A hundred steps on eight ranks are a hundred steps, on one rank too; and exactly the same on eight."""
    root, curriculum = make_webvid(tmp_path, 2), Curriculum(steps=1000)

    def resumed(state: Any, batch: int) -> VideoDataModule:
        module = make(root, batch_size=batch, curriculum=curriculum)
        if state:
            module.load_state_dict(json.loads(json.dumps(state)))
        module.train_dataloader()
        return module

    def after(module: VideoDataModule, consumed: int) -> dict[str, Any]:
        return {**module.state_dict(), "consumed": consumed}

    first = after(resumed(None, 32), 3216)  # within the hundredth step
    assert [resumed(first, 32).source().schedule.at(p) for p in (3199, 3200, 3231, 3232)] == [99, 100, 100, 101]
    second = after(resumed(first, 4), 3216 + 4 * 7)
    assert [resumed(first, 4).source().schedule.at(p) for p in (3216, 3219, 3220, 3216 + 28)] == [100, 100, 101, 107]
    assert [resumed(second, 4).source().schedule.at(p) for p in (3216 + 28, 3216 + 32)] == [107, 108]
    assert [resumed(second, 16).source().schedule.at(p) for p in (3216 + 28, 3216 + 43, 3216 + 44)] == [107, 107, 108]


def test_broken_clips_are_skipped_and_counted(tmp_path: Path, make_webvid: Any, make_video: Any) -> None:
    root = make_webvid(tmp_path, 3, extra=("half", "empty", "missing", "short"))
    whole = (root / "mp4" / "000.mp4").read_bytes()
    (root / "mp4" / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "mp4" / "empty.mp4").write_bytes(b"")
    make_video(root / "mp4" / "short.mp4", [0, 1, 2])
    module = make(root, batch_size=7)
    for batch in batches(module, 2):
        batch = module.on_before_batch_transfer(batch, 0)
        assert set(batch["key"]) <= {"000", "001", "002"} and len(batch["key"]) == 7
    assert module.skipped["the file is missing"] >= 2
    assert module.skipped["the clip is too short for 4 frames"] >= 2
    assert sum(n for cause, n in module.skipped.items() if "cannot be opened" in cause) >= 4


def test_wrong_folders_end_in_a_sentence(tmp_path: Path, make_webvid: Any) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        make(tmp_path / "nowhere").setup()
    with pytest.raises(FileNotFoundError, match="no CSV file"):
        make(tmp_path).setup()
    (tmp_path / "a.csv").write_text("id,name\n1,x\n")
    with pytest.raises(ValueError, match="a.csv lacks the column videoid and page_dir"):
        make(tmp_path).setup()
    (tmp_path / "a.csv").write_text("videoid,page_dir\n1,x\n")
    with pytest.raises(ValueError, match="No video listed in .*a.csv"):
        make(tmp_path).setup()
    make_webvid(tmp_path, 1)
    with pytest.raises(ValueError, match="several CSV files"):
        make(tmp_path).setup()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_run_goes_on_exactly(tmp_path: Path, make_webvid: Any, fit: Any, workers: int) -> None:
    root = make_webvid(tmp_path / "data", 5)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(make(root, workers=workers), 5, callbacks=[saver])
    path = tmp_path / "step=2.ckpt"
    assert torch.load(path, weights_only=True)["VideoDataModule"]["consumed"] == 4
    assert fit(make(root, workers=workers), 5, ckpt_path=path) == whole[2:]


def test_resumed_clips_are_the_same_to_the_pixel(tmp_path: Path, make_webvid: Any) -> None:
    root = make_webvid(tmp_path, 3, frames=48)
    straight = batches(make(root), 4)
    module = make(root, workers=1)
    module.preview(1)  # a decoder used before the workers fork must not hurt them
    module.load_state_dict({"consumed": 4})
    for a, b in zip(batches(module, 2), straight[2:], strict=True):
        assert a["key"] == b["key"] and torch.equal(a["fps"], b["fps"]) and torch.equal(a["video"], b["video"])


def test_the_demo_clips_load() -> None:
    module = make(DEMO, batch_size=96, frames=2)
    (batch,) = batches(module, 1)
    assert len(set(batch["key"])) == 96 and not batch["skipped"]
    preview, again = make(DEMO).preview(2), make(DEMO, seed=1).preview(2)
    assert torch.equal(preview["video"], again["video"])
    assert preview["fps"].tolist() == pytest.approx([6.8, 6.8], rel=0.05)
