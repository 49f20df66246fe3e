"""Joint image-video training: whose turn it is, on every rank and after a resume, and that no caption comes along."""

import pickle
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import Curriculum, ImageTextDataModule, VideoDataModule
from datamodules.joint import Turns
from datamodules.shards import Mixture

CLIPS, PICTURES = 0, 1


@pytest.fixture
def make(tmp_path: Path, make_webvid: Any, make_shard: Any) -> Any:
    """make(share, **options): five clips and, where share is not 0, thirty captioned pictures."""
    videos, pairs = make_webvid(tmp_path / "videos", 5), make_shard(tmp_path / "00000.tar", 30)

    def data(share: float, **options: Any) -> VideoDataModule:
        images = ImageTextDataModule(str(pairs), 2, 16, text=False) if share else None
        given: dict[str, Any] = {"batch_size": 2, "frames": 4, "resolution": 16, "curriculum": Curriculum(steps=10)}
        return VideoDataModule(videos, images=images, image_share=share, **given | options)

    return data


def batches(module: VideoDataModule, n: int) -> list[dict[str, Any]]:
    return list(islice(iter(module.train_dataloader()), n))


def turns(share: float, start: tuple[int, list[int]], rank: int = 0, world: int = 1) -> Turns:
    return Turns(Mixture(3, [1 - share, share]), lambda: start, (2, 8), rank, world)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_pictures_have_their_share_of_the_batches(share: float) -> None:
    kinds = Counter(batch[0][0] for batch in islice(turns(share, (0, [0, 0])), 4000))
    assert kinds[PICTURES] == 4000 * share
    mixture = Mixture(3, [1 - share, share])
    for n in (0, 1, 999, 1000, 1001, 2345):
        assert mixture.before(n).tolist() == np.bincount([mixture(i)[0] for i in range(n)], minlength=2).tolist()


def test_ranks_take_turns_together_and_share_the_positions() -> None:
    ranks = [list(islice(turns(0.5, (7, [40, 100]), rank, 3), 30)) for rank in range(3)]
    following = {CLIPS: 40, PICTURES: 100}
    for together in zip(*ranks, strict=True):
        kinds, positions = zip(*[place for batch in together for place in batch], strict=True)
        (kind,) = set(kinds)
        assert list(positions) == list(range(following[kind], following[kind] + 3 * (2, 8)[kind]))
        following[kind] += len(positions)
    assert min(following.values()) > 110


def test_a_batch_is_of_clips_or_of_pictures_without_text(make: Any) -> None:
    module = make(0.5)
    seen = batches(module, 12)
    clips, pictures = [b for b in seen if "video" in b], [b for b in seen if "image" in b]
    assert len(clips) + len(pictures) == 12 and min(len(clips), len(pictures)) > 2
    for batch in pictures:
        assert set(batch) == {"image", "key", "seed", "skipped"} and batch["image"].shape == (8, 3, 16, 16)
        assert "caption" not in repr(batch) and b"caption" not in pickle.dumps(batch)
    assert "caption" in ImageTextDataModule(module.images.groups[0], 2, 16).preview(1)["text"][0]  # type: ignore[union-attr]
    assert len({key for batch in pictures for key in batch["key"]}) == min(30, 8 * len(pictures))


def test_the_clips_are_those_there_would_be_without_pictures(make: Any) -> None:
    joint = [batch["key"] for batch in batches(make(0.5), 20) if "video" in batch]
    assert joint == [batch["key"] for batch in batches(make(0.0), len(joint))]


def test_the_curriculum_goes_by_steps(make: Any) -> None:
    """Half of the steps have no clips: after ten steps rates have fallen as far as after ten clips alone."""
    module = make(0.5, batch_size=50, curriculum=Curriculum(steps=20, f_min=3, f_max=24))
    clips = module.dataset().streams[CLIPS]  # type: ignore[attr-defined]
    assert clips.sources[0].schedule.samples_per_step == 25
    plain = make(0.0, batch_size=50)
    assert plain.dataset().sources[0].schedule.samples_per_step == 50  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_run_goes_on_exactly(tmp_path: Path, make: Any, fit: Any, workers: int) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(make(0.5, workers=workers), 12, callbacks=[saver])
    assert {len(keys) for keys in whole} == {2, 8}
    for stop in (3, 8):
        path = tmp_path / f"step={stop}.ckpt"
        state = torch.load(path, weights_only=True)["VideoDataModule"]
        assert state["consumed"] == 2 * sum(len(keys) == 2 for keys in whole[:stop])
        assert state["pictures"] == 8 * sum(len(keys) == 8 for keys in whole[:stop])
        assert fit(make(0.5, workers=workers), 12, ckpt_path=path) == whole[stop:]


def test_pictures_that_cannot_be_read_are_counted_with_the_clips(
    tmp_path: Path, make_webvid: Any, make_shard: Any
) -> None:
    pairs = make_shard(tmp_path / "a.tar", 4, broken={1: {"jpg": b"rubbish"}})
    images = ImageTextDataModule(str(pairs), 2, 16, text=False)
    module = VideoDataModule(
        make_webvid(tmp_path, 2), 2, 4, 16, curriculum=Curriculum(steps=1), images=images, image_share=0.9
    )
    for batch in batches(module, 5):
        module.on_before_batch_transfer(batch, 0)
    assert module.skipped["the image cannot be decoded (UnidentifiedImageError)"] >= 1


def test_wrong_shares_are_told(make: Any) -> None:
    for share in (1.0, -0.1):
        with pytest.raises(ValueError, match="share of pictures is .* less than 1"):
            make(share)
    images = ImageTextDataModule(make(0.5).images.groups[0], 2, 16)
    with pytest.raises(ValueError, match="no place for captions"):
        VideoDataModule("x", 2, 4, 16, curriculum=Curriculum(steps=1), images=images, image_share=0.5)
