"""Captioned stills: what a batch holds, what is skipped, and that a resumed run goes on exactly."""

import io
import logging
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from datamodules import ImageTextDataModule, image_text
from datamodules.image_text import decode
from datamodules.pixels import square

DEMO = Path(__file__).parents[2] / "experiments" / "demo"


def batches(module: Any, n: int) -> list[dict[str, Any]]:
    return list(islice(iter(module.train_dataloader()), n))


def test_a_batch_holds_squares_captions_and_keys(tmp_path: Path, make_shard: Any) -> None:
    make_shard(tmp_path / "a.tar", 8, size=(300, 200))
    (batch,) = batches(ImageTextDataModule(str(tmp_path), batch_size=8, resolution=32), 1)
    assert batch["image"].shape == (8, 3, 32, 32) and batch["image"].dtype == torch.uint8
    assert sorted(batch["key"]) == [f"{i:09d}" for i in range(8)]
    assert all(str(int(key)) in text for key, text in zip(batch["key"], batch["text"], strict=True))
    red = batch["image"][batch["key"].index("000000000")].float().mean((1, 2))
    assert red[0] > 240 and red[1:].max() < 16


def test_a_whole_picture_is_enlarged_and_a_crop_never(tmp_path: Path, make_shard: Any) -> None:
    make_shard(tmp_path / "a.tar", 4, size=(20, 30))
    (batch,) = batches(ImageTextDataModule(str(tmp_path), batch_size=4, resolution=64), 1)
    assert batch["image"].shape == (4, 3, 64, 64)
    (batch,) = batches(ImageTextDataModule(str(tmp_path), batch_size=4, resolution=64, crop=16), 1)
    assert batch["image"].shape == (4, 3, 16, 16)
    with pytest.raises(RuntimeError, match="the picture is smaller than the crop of 24 pixels"):
        batches(ImageTextDataModule(str(tmp_path), batch_size=4, resolution=64, crop=24), 1)


def test_a_crop_shows_the_pixels_of_the_picture() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(1, 40, 50, 3), dtype=np.uint8)
    assert np.array_equal(square(pixels, 64, crop=16).permute(0, 2, 3, 1), pixels[:, :, 5:45])
    assert square(pixels, 32, crop=16).shape == (1, 3, 32, 32)


def test_a_crop_is_not_larger_than_the_resolution(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="crop is 65 pixels of 64"):
        ImageTextDataModule(str(tmp_path), batch_size=4, resolution=64, crop=65)


def encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_as_their_exif_says(kind: str) -> None:
    rng = np.random.default_rng(0)
    upright = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8).repeat(32, 0).repeat(32, 1)
    right = decode(encoded(upright, "PNG"), 16).float()
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1)}
    stored |= {6: np.rot90(upright), 7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright, -1)}
    quality: dict[str, Any] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        got = decode(encoded(np.ascontiguousarray(pixels), kind, exif=exif, **quality), 16).float()
        assert (got - right).abs().mean() < 8, orientation
    assert (decode(encoded(upright, kind, exif=b"Exif\0\0no tags"), 16).float() - right).abs().mean() < 8


def test_grey_of_sixteen_bits_is_grey() -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
    got = decode(encoded(ramp, "PNG"), 64)
    assert (got[0, 0].int() - torch.from_numpy((ramp[0] >> 8).astype(np.int32))).abs().max() <= 1


def test_a_picture_that_unpacks_to_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("1", (8000, 8000)).save(file, "PNG")
    with pytest.raises(ValueError, match="DecompressionBombError"):
        decode(file.getvalue(), 16)
    monkeypatch.setattr(image_text, "LARGEST", 64 * 64)  # what counts is the size that is decoded
    pixels = np.full((480, 480, 3), 99, np.uint8)
    assert decode(encoded(pixels, "JPEG"), 16).shape == (3, 16, 16)
    with pytest.raises(ValueError, match="DecompressionBombError"):
        decode(encoded(pixels, "PNG"), 16)


def test_the_name_does_not_choose_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """An EPS would be handed to Ghostscript, whatever its name."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    for kind in ("EPS", "TIFF", "GIF"):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, kind)
        with pytest.raises(ValueError, match="UnidentifiedImageError"):
            decode(file.getvalue(), 16)


def test_half_of_the_captions_are_alternatives(tmp_path: Path, make_shard: Any) -> None:
    make_shard(tmp_path / "a.tar", 4, size=(8, 8))
    drawn = [t for b in batches(ImageTextDataModule(str(tmp_path), 100, 8), 5) for t in b["text"]]
    share = sum(text.startswith("alt") for text in drawn) / len(drawn)
    assert 0.4 < share < 0.6 and any(text.endswith("b") for text in drawn)
    main = batches(ImageTextDataModule(str(tmp_path), 100, 8, random_caption=False), 1)[0]["text"]
    assert all(text.startswith("caption") for text in main)


BROKEN = {
    "image": ({"jpg": b"\xff\xd8 not a picture"}, "the image cannot be decoded"),
    "empty image": ({"jpg": b""}, "the image cannot be decoded"),
    "json": ({"json": b"{no json"}, "the json is not valid JSON"),
    "list": ({"json": b"[1]"}, "the json is not an object"),
    "bytes": ({"txt": b"\xff\xfe\xfa"}, "the caption is not UTF-8"),
    "json bytes": ({"json": b'{"caption": "\xff"}'}, "the json is not UTF-8"),
    "empty caption": ({"txt": b" ", "json": b'{"caption": ""}'}, "the caption is empty"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_sample_is_skipped_and_counted(
    tmp_path: Path, make_shard: Any, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    content, cause = BROKEN[case]
    make_shard(tmp_path / "a.tar", 8, broken={5: content})
    module = ImageTextDataModule(str(tmp_path), batch_size=8, resolution=16)
    with caplog.at_level(logging.WARNING):
        for batch in batches(module, 2):
            batch = module.on_before_batch_transfer(batch, 0)
            assert len(batch["key"]) == 8 and "000000005" not in batch["key"] and "skipped" not in batch
    ((counted, times),) = module.skipped.items()
    assert counted.startswith(cause) and times >= 2
    assert len(caplog.messages) == 1 and "a.tar:000000005" in caplog.messages[0]


def test_half_a_picture_is_skipped(tmp_path: Path, make_shard: Any) -> None:
    make_shard(tmp_path / "a.tar", 1, size=(256, 256))
    Image.effect_noise((256, 256), 90).save(tmp_path / "whole.jpg")
    half = (tmp_path / "whole.jpg").read_bytes()
    make_shard(tmp_path / "a.tar", 4, broken={2: {"jpg": half[: len(half) // 2]}})
    module = ImageTextDataModule(str(tmp_path / "a.tar"), batch_size=4, resolution=64)
    module.on_before_batch_transfer(batches(module, 1)[0], 0)
    assert "the image cannot be decoded (OSError)" in module.skipped


def test_a_truncated_shard_is_counted(tmp_path: Path, make_shard: Any) -> None:
    path = make_shard(tmp_path / "a.tar", 20)
    path.write_bytes(path.read_bytes()[:20_000])
    module = ImageTextDataModule(str(path), batch_size=4, resolution=16)
    assert batches(module, 1)[0]["image"].shape[0] == 4
    assert any("truncated" in cause for cause in module.skipped)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.tar"):
        ImageTextDataModule(str(tmp_path / "nowhere.tar"), 4, 16).setup()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 3}], ids=["one epoch", "short epochs"])
def test_an_interrupted_run_goes_on_exactly(
    tmp_path: Path, make_shard: Any, fit: Any, workers: int, options: dict[str, Any]
) -> None:
    make_shard(tmp_path / "a.tar", 10, size=(16, 16))

    def module() -> ImageTextDataModule:
        return ImageTextDataModule(str(tmp_path / "a.tar"), batch_size=3, resolution=8, workers=workers)

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(module(), 8, callbacks=[saver], **options)
    for stop in (1, 3, 5):
        path = tmp_path / f"step={stop}.ckpt"
        assert torch.load(path, weights_only=True)["ImageTextDataModule"]["consumed"] == stop * 3
        rest = module()
        # On the other number of workers: neither is what was fetched ahead part of the position.
        rest.workers = 2 - workers
        assert fit(rest, 8, ckpt_path=path, **options) == whole[stop:]
        assert rest.state_dict()["consumed"] == 24


def test_a_run_can_go_on_with_other_ranks(tmp_path: Path, make_shard: Any) -> None:
    make_shard(tmp_path / "a.tar", 11, size=(8, 8))
    module = ImageTextDataModule(str(tmp_path), batch_size=4, resolution=8)
    straight = [key for batch in batches(module, 6) for key in batch["key"]]
    module.load_state_dict({"consumed": 8})
    assert [key for batch in batches(module, 4) for key in batch["key"]] == straight[8:]


def test_the_preview_is_the_same_each_time(tmp_path: Path, make_shard: Any) -> None:
    make_shard(tmp_path / "a.tar", 6, broken={1: {"jpg": b"no"}})
    first, second = (ImageTextDataModule(str(tmp_path), 2, 16, seed=s).preview(3) for s in (0, 1))
    assert first["key"] == second["key"] == ["000000000", "000000002", "000000003"]
    assert first["text"][0] == "caption 0" and torch.equal(first["image"], second["image"])


def test_the_demo_stills_load() -> None:
    module = ImageTextDataModule(str(DEMO / "pairs" / "{00000..00001}.tar"), batch_size=64, resolution=32)
    first, second = batches(module, 2)
    assert len({*first["key"], *second["key"]}) == 128 and not first["skipped"] + second["skipped"]
    assert any("octopus" in text for text in module.preview(128)["text"])


def test_the_demo_data_stay_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 24 * 2**20
