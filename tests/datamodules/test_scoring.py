"""Clips to be scored: each once, alike on every run, and what cannot be read is told."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.clips import open_video
from datamodules.scoring import Scored, Shown, look
from datamodules.video_sources import Clip, list_clips, list_folder
from tests.experiments.sets import frames, write, write_packed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips: two sound ones of 30 frames, a short one, a damaged one, one of another size, and one of 20 frames."""
    root = tmp_path_factory.mktemp("clips")
    for i, (name, n) in enumerate((("a", 30), ("b", 30), ("c", 5), ("f", 20))):
        write(root / f"{name}.mp4", frames(n, seed=i))
    write(root / "e.mp4", frames(30, 32, 48))
    (root / "d.mp4").write_bytes((root / "a.mp4").read_bytes()[:700])
    return root


def batches(shown: list[Shown], workers: int = 0) -> tuple[list[dict], Scored]:
    scored = Scored(shown, 2, workers)
    return list(scored), scored


def test_each_clip_once_and_failures_are_counted(folder: Path) -> None:
    clips = list_folder(folder)
    real = Shown(clips, 16, 24, rate=25.0, seed=3)
    found, scored = batches([real])
    assert [k for batch in found for k in batch["number"]] == [0, 1, 4, 5]
    assert all(batch["video"].shape[1:] == (3, 16, 24, 24) and batch["video"].dtype == torch.uint8 for batch in found)
    causes = {"the clip is too short for 16 frames": 1, "the video cannot be opened (InvalidDataError)": 1}
    assert scored.skipped[0] == causes
    assert "c.mp4" in scored.worst(0) and scored.counts == [4] and abs(scored.mean_rate(0) - 25) < 1e-6
    again, other = batches([real], workers=2)
    assert all(torch.equal(a["video"], b["video"]) for a, b in zip(found, again, strict=True))
    assert other.skipped == scored.skipped
    drawn = batches([Shown(clips, 16, 24, rate=25.0, seed=4)])[0]
    assert not all(torch.equal(a["video"], b["video"]) for a, b in zip(found, drawn, strict=True))


def test_generated_clips_are_their_first_frames_and_kinds_do_not_mix(folder: Path) -> None:
    clips = [clip for clip in list_folder(folder) if clip.key in ("a.mp4", "b.mp4", "f.mp4")]
    found, scored = batches([Shown(clips, 16, 0), Shown(clips, 16, 48, rate=25.0)])
    assert [(batch["kind"], batch["number"]) for batch in found] == [(0, [0, 1]), (0, [2]), (1, [0, 1]), (1, [2])]
    shown = open_video(folder / "a.mp4").frames(np.arange(16))[:, :, 8:56]  # the centre square
    assert np.array_equal(found[0]["video"][0].permute(1, 2, 3, 0).numpy(), shown)
    assert scored.counts == [3, 3] and scored.waiting > 0


def test_generated_clips_of_several_sizes_are_refused(folder: Path) -> None:
    clips = [clip for clip in list_folder(folder) if clip.key in ("a.mp4", "e.mp4")]
    with pytest.raises(ValueError, match="e.mp4 has frames of 48x32 pixels, those before it of 64x48"):
        batches([Shown(clips, 16, 0)])
    assert batches([Shown(clips, 16, 40)])[1].counts == [2]
    assert look(clips, 16) == (48, 25.0)
    with pytest.raises(ValueError, match="none of the 1 clips can be read"):
        look([Clip("c", str(folder / "c.mp4"))], 16)


def test_shards_of_clips_are_scored_too(folder: Path, tmp_path: Path) -> None:
    """video2dataset's tars: a sample that it failed at has no video, and is told."""
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for key, name in (("00000000", "a.mp4"), ("00000001", "b.mp4")):
            (tmp_path / f"{key}.json").write_text('{"status": "success"}')
            tar.add(folder / name, f"{key}.mp4")
            tar.add(tmp_path / f"{key}.json", f"{key}.json")
        (tmp_path / "failed.json").write_text('{"status": "failed_to_download"}')
        tar.add(tmp_path / "failed.json", "00000002.json")
    clips, problems = list_clips(tmp_path)
    assert [cause for _, cause in problems] == ["video2dataset: failed_to_download"]
    found, scored = batches([Shown(clips, 16, 24, rate=25.0)])
    assert scored.counts == [2] and found[0]["video"].shape == (2, 3, 16, 24, 24)


def test_packed_b_frames_are_the_right_ones_from_any_start(tmp_path: Path) -> None:
    """A seek lands frames away in such a file; thousands of UCF-101 are of this kind."""
    clip = frames(41)
    write_packed(tmp_path / "packed.avi", clip)
    video = open_video(tmp_path / "packed.avi")
    assert video.packed and len(video.times) == 41
    for start in (0, 13, 24, 25):
        taken = video.frames(np.arange(start, start + 16)).astype(int)
        nearest = [int(np.abs(clip.astype(int) - frame).mean((1, 2, 3)).argmin()) for frame in taken]
        assert nearest == list(range(start, start + 16))
    write(tmp_path / "plain.avi", clip, "mpeg4", bf="1")
    assert not open_video(tmp_path / "plain.avi").packed
