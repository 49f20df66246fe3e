"""Embeddings beside the shards: each sample gets its own, and what does not fit is said."""

import logging
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from datamodules import ImageTextDataModule, embeddings, image_text
from datamodules.image_text import open_pairs

CLIP = "ViT-B-32/laion2b"


def vector(key: str, shift: float) -> torch.Tensor:
    """An embedding that names its sample."""
    return normalize(torch.tensor([int(key) + shift, 10.0, 1.0]), dim=0)


@pytest.fixture
def shards(tmp_path: Path, make_shard: Any) -> Path:
    """Two shards of five and their embeddings; that of the seventh could not be computed."""
    for name, first in (("a", 0), ("b", 5)):
        make_shard(tmp_path / f"{name}.tar", 5, first=first)
        entries = open_pairs([str(tmp_path / f"{name}.tar")], 8)[0].entries
        image = torch.stack([vector(entry.key, 0.0) for entry in entries])
        image[[entry.key == "000000006" for entry in entries]] = 0
        embeddings.write(entries, CLIP, image, torch.stack([vector(entry.key, 0.5) for entry in entries]))
    return tmp_path


def module(shards: Path, resolution: int = 0, **options: Any) -> ImageTextDataModule:
    return ImageTextDataModule(str(shards), 5, resolution, clip=CLIP, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_every_sample_has_its_own(shards: Path, workers: int) -> None:
    data = module(shards, 16, workers=workers)
    keys = []
    for batch in islice(iter(data.train_dataloader()), 4):
        assert batch["image"].shape == (5, 3, 16, 16)
        for key, text, image, words in zip(
            batch["key"], batch["text"], batch["image_embedding"], batch["text_embedding"], strict=True
        ):
            torch.testing.assert_close(image, vector(key, 0.0), atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(words, vector(key, 0.5), atol=1e-3, rtol=1e-3)
            assert image.norm() == pytest.approx(1, abs=1e-6)
            assert text == f"caption {int(key)}"  # the main caption, which was embedded
        keys += batch["key"]
        data.on_before_batch_transfer(batch, 0)
    assert len(set(keys)) == 9 and "000000006" not in keys
    assert data.skipped == {"the sample could not be read when embeddings were computed": 2}


def test_without_a_resolution_no_picture_is_decoded(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_text, "decode", lambda *_: pytest.fail("decoded"))
    batch = next(iter(module(shards).train_dataloader()))
    assert "image" not in batch and batch["image_embedding"].shape == (5, 3)


def test_a_shard_without_embeddings_is_named(shards: Path, make_shard: Any) -> None:
    make_shard(shards / "c.tar", 2, first=20)
    with pytest.raises(
        FileNotFoundError, match="1 shards have no embeddings .* c.tar.*make embed".replace(" c", ".*c")
    ):
        module(shards).setup()
    with pytest.raises(FileNotFoundError, match="3 shards have no embeddings by other"):
        ImageTextDataModule(str(shards), 5, 0, clip="other").setup()


def test_a_shard_that_changed_is_refused(shards: Path, make_shard: Any) -> None:
    make_shard(shards / "a.tar", 5, first=40)
    with pytest.raises(ValueError, match="a.tar has changed .* make embed".replace(" make", ".*make")):
        module(shards).setup()


def test_the_same_keys_with_other_pictures_are_refused(shards: Path, make_shard: Any) -> None:
    make_shard(shards / "a.tar", 5, size=(64, 64))
    with pytest.raises(ValueError, match="a.tar has changed"):
        module(shards).setup()


@pytest.mark.parametrize("damage", ["another clip", "cut"])
def test_a_foreign_or_damaged_file_is_refused(shards: Path, damage: str) -> None:
    own = Path(embeddings.beside(str(shards / "a.tar"), CLIP))
    if damage == "cut":
        own.write_bytes(own.read_bytes()[:30])
    else:  # a name that makes the same file
        entries = open_pairs([str(shards / "a.tar")], 8)[0].entries
        embeddings.write(entries, CLIP.replace("/", "-"), torch.ones(5, 3), torch.ones(5, 3))
    with pytest.raises(ValueError, match="run\n?.*make embed"):
        module(shards).setup()


def test_a_corrupt_shard_needs_none(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    (shards / "broken.tar").write_bytes(b"x" * 2000)
    with caplog.at_level(logging.WARNING):
        data = module(shards)
        data.setup()
    assert len(data.sources()[0]) == 10 and sum(data.skipped.values()) == 1


def test_a_file_is_written_whole(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = open_pairs([str(shards / "a.tar")], 8)[0].entries
    before = Path(embeddings.beside(entries[0].shard, CLIP)).read_bytes()

    def dies(tensors: Any, path: Path, header: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(embeddings, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        embeddings.write(entries, CLIP, torch.ones(5, 3), torch.ones(5, 3))
    assert Path(embeddings.beside(entries[0].shard, CLIP)).read_bytes() == before
