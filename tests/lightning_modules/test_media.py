"""Films as files: what is read back is what was written, and so is the note."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_modules.media import FORMATS, presented, read_note, write

NOTE = {"prompt": 'a fox 狐 \U0001f98a "quoted" \\ \n', "seed": 2**47, "cascade": {"fps": 6.0, "steps": [1, 2]}}


@pytest.fixture
def clip() -> torch.Tensor:
    """A square that moves over a gradient, `3 12 48 48`."""
    line = torch.linspace(-0.8, 0.8, 48)
    frames = torch.stack([line.expand(48, 48), line[:, None].expand(48, 48), torch.zeros(48, 48)])
    clip = frames[:, None].repeat(1, 12, 1, 1)
    for i in range(12):
        clip[:, i, 16:32, 2 * i : 2 * i + 16] = torch.tensor([0.9, -0.9, -0.9])[:, None, None]
    return clip


def frames_of(path: Path) -> tuple[np.ndarray, float, str]:
    """A film's frames, its seconds, and its codec."""
    if path.is_dir():
        return np.stack([np.asarray(Image.open(p)) for p in sorted(path.glob("*.png"))]), 0.0, "png"
    if path.suffix in (".gif", ".webp"):
        image = Image.open(path)
        frames, seconds = [], 0.0
        for i in range(image.n_frames):  # type: ignore[attr-defined]
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
            seconds += image.info["duration"] / 1000
        return np.stack(frames), seconds, str(image.format)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(pictures), len(pictures) / float(stream.average_rate or 1), stream.codec_context.name


@pytest.mark.parametrize("form", FORMATS)
def test_what_was_written_is_read(tmp_path: Path, clip: torch.Tensor, form: str) -> None:
    path = write(tmp_path / "film v1.5", clip, 30.0, form, NOTE)
    assert path.name == ("film v1.5" if form == "png" else f"film v1.5.{form}")
    frames, seconds, codec = frames_of(path)
    wanted = ((clip + 1) * 127.5).round().permute(1, 2, 3, 0).numpy()
    assert frames.shape == (12, 48, 48, 3)
    # colours are kept at half the side in mp4 and webm, a GIF has 256 of them
    assert np.abs(frames.astype(float) - wanted).mean() < {"png": 0.01, "gif": 7}.get(form, 6)
    assert codec in {"mp4": ("h264",), "webm": ("vp9", "libvpx-vp9"), "gif": ("GIF",), "webp": ("WEBP",)}.get(
        form, ("png",)
    )
    if form != "png":
        assert seconds == pytest.approx(0.4, abs=0.011)
    assert read_note(path) == NOTE
    assert not list(tmp_path.glob("**/*.part"))


@pytest.mark.parametrize("form", FORMATS)
def test_a_film_without_a_note(tmp_path: Path, clip: torch.Tensor, form: str) -> None:
    path = write(tmp_path / "film", clip[:, :2], 6.0, form)
    with pytest.raises(ValueError, match="does not say how it was made"):
        read_note(path)


def test_notes_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no film at"):
        read_note(tmp_path / "film.mp4")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no film")
    (tmp_path / "text.gif").write_text("no film")
    for name in ("empty", "text.mp4", "text.gif"):
        with pytest.raises(ValueError, match="does not say how it was made"):
            read_note(tmp_path / name)


def test_a_shorter_film_leaves_no_frames_of_the_longer(tmp_path: Path, clip: torch.Tensor) -> None:
    for frames in (12, 5):
        write(tmp_path / "film", clip[:, :frames], 6.0, "png", NOTE)
    assert len(list((tmp_path / "film").iterdir())) == 5


def test_one_frame_and_odd_sides(tmp_path: Path, clip: torch.Tensor) -> None:
    for form in FORMATS:
        frames = frames_of(write(tmp_path / "film", clip[:, :1, :47, :45], 6.0, form))[0]
        assert frames.shape == ((1, 46, 44, 3) if form in ("mp4", "webm") else (1, 47, 45, 3))


def test_an_unknown_format(tmp_path: Path, clip: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="no format 'avi': it is one of mp4, webm, gif, webp, png"):
        write(tmp_path / "film", clip, 6.0, "avi")


def test_the_presentation_copy_is_antialiased() -> None:
    """Lines of one pixel become grey, not stripes; a ramp stays a ramp."""
    clip = torch.ones(3, 2, 96, 96)
    clip[..., ::2] = -1
    small = presented(clip, 32)
    assert small.shape == (3, 2, 32, 32) and small[..., 4:-4].abs().max() < 0.1
    ramp = torch.linspace(-0.9, 0.9, 96).expand(3, 2, 96, 96)
    expected = ramp.unflatten(-1, (32, 3)).mean(-1)[..., :32, :]
    assert (presented(ramp, 32)[..., 4:-4] - expected[..., 4:-4]).abs().max() < 0.01


@pytest.mark.parametrize("fps, shown", [(50.0, 12), (60.0, 10), (100.0, 6), (2000.0, 1)])
def test_a_fast_gif_keeps_its_time(tmp_path: Path, clip: torch.Tensor, fps: float, shown: int) -> None:
    """Programs show no frame for less than two hundredths of a second, so some are left out."""
    frames, seconds, _ = frames_of(write(tmp_path / "film", clip, fps, "gif"))
    assert len(frames) == shown and seconds == pytest.approx(12 / fps, abs=0.01)


@pytest.mark.parametrize("form", FORMATS)
def test_what_cannot_be_written_leaves_the_old(
    tmp_path: Path, clip: torch.Tensor, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "film", clip, 6.0, form, NOTE)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    written = []

    def full(path: Path) -> None:
        written.append(path)
        if len(written) > 2 or form != "png":
            raise OSError("no space left on device")

    monkeypatch.setattr("lightning_modules.whole.flush", full)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path / "film", -clip, 6.0, form, NOTE)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before and path.exists()
