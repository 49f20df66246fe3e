"""The curriculum of rates, the choice of frames, and the rate that is told."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.clips import Curriculum, choose_frames, read_clip, time_stamps

RATES = (1.0, 3.0, 6.8, 10.0, 12.0, 17.3, 23.976, 24.0, 60.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("step", "mean"), [(0, 24.2), (500, 15.5), (1000, 6.8), (5000, 6.8)])
def test_the_curriculum_has_the_means_it_says(step: int, mean: float) -> None:
    curriculum = Curriculum(steps=1000)
    draws = [curriculum.draw(rng(i), step) for i in range(4000)]
    assert curriculum.mean(step) == pytest.approx(mean)
    assert np.mean(draws) == pytest.approx(mean, abs=0.4)
    assert 1 <= min(draws) and max(draws) <= 30


def test_the_curriculum_falls_and_is_pure() -> None:
    curriculum = Curriculum(steps=100)
    means = [curriculum.mean(step) for step in range(101)]
    assert all(a > b for a, b in zip(means, means[1:], strict=False))
    assert curriculum.draw(rng(3), 40) == curriculum.draw(rng(3), 40)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 1, "f_min": 0}, {"steps": 1, "m1": 1.5}])
def test_a_curriculum_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="curriculum"):
        Curriculum(**wrong)


def test_time_stamps() -> None:
    assert time_stamps(0.5, 4, 3).tolist() == [0.5, 0.75, 1.0]


@pytest.mark.parametrize("f", RATES)
@pytest.mark.parametrize("seed", range(5))
def test_frames_are_distinct_and_the_rate_is_that_of_the_frames_taken(f: float, seed: int) -> None:
    times = np.arange(72) / 24 + 0.04
    indices, fps = choose_frames(3.0, 24.0, times, f, 16, rng(seed))
    assert len(indices) == 16 and 0 <= indices[0] and indices[-1] < 72 and (np.diff(indices) > 0).all()
    assert fps == pytest.approx(15 / (times[indices[-1]] - times[indices[0]]))
    assert fps == pytest.approx(np.clip(f, 15 / 3.0, 24.0), rel=0.05)


def test_starts_vary_and_cover_the_clip() -> None:
    times = np.arange(72) / 24
    starts = [choose_frames(3.0, 24.0, times, 24.0, 16, rng(i))[0][0] for i in range(500)]
    assert set(starts) == set(range(57))


def test_a_source_too_short_is_refused_and_one_just_long_enough_is_taken_whole() -> None:
    times = np.arange(15) / 24
    with pytest.raises(ValueError, match="too short for 16 frames"):
        choose_frames(15 / 24, 24.0, times, 8.0, 16, rng())
    indices, fps = choose_frames(15 / 24, 24.0, times, 8.0, 15, rng())
    assert indices.tolist() == list(range(15)) and fps == pytest.approx(24)
    with pytest.raises(ValueError, match="at least 2"):
        choose_frames(15 / 24, 24.0, times, 8.0, 1, rng())


@pytest.mark.parametrize("f", [2.0, 8.0, 11.0, 24.0])
def test_the_frames_read_are_the_frames_chosen(tmp_path: Path, make_video: Any, f: float) -> None:
    path = make_video(tmp_path / "a.mp4", list(range(72)))
    video, fps = read_clip(path, f, 16, 16, rng())
    assert video.shape == (3, 16, 16, 16)
    shown = (video.float().mean((0, 2, 3)) / 3).round()  # the grey level carries the index of the frame
    assert fps == pytest.approx(15 / (float(shown[-1] - shown[0]) / 24), rel=1e-5)
    assert fps == pytest.approx(max(f, 15 / (71 / 24)), rel=0.03)


def test_a_variable_frame_rate_is_read_by_its_times(tmp_path: Path, make_video: Any) -> None:
    ticks = [*range(0, 30), *range(30, 90, 3)]  # 24 frames per second, then 8
    path = make_video(tmp_path / "a.mp4", ticks)
    for seed in range(6):
        video, fps = read_clip(path, 4.0, 8, 16, rng(seed))
        shown = (video.float().mean((0, 2, 3)) / 3).round().int().tolist()
        at = np.array([ticks[i] for i in shown]) / 24
        assert fps == pytest.approx(7 / (at[-1] - at[0]), rel=1e-3)
        assert np.abs(np.diff(at) - 0.25).max() <= 3 / 24 + 1e-6


def test_a_crop_is_the_same_in_all_frames(tmp_path: Path, make_video: Any) -> None:
    path = make_video(tmp_path / "a.mp4", list(range(24)))
    assert read_clip(path, 24, 4, 32, rng(), crop=8)[0].shape == (3, 4, 8, 8)


def test_damaged_files_are_value_errors(tmp_path: Path, make_video: Any) -> None:
    data = make_video(tmp_path / "a.mp4", list(range(48))).read_bytes()
    for name, content in {"half": data[: len(data) // 2], "empty": b"", "text": b"no video" * 99}.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="the video"):
            read_clip(path, 8, 4, 16, rng())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_clip(tmp_path / "nowhere.mp4", 8, 4, 16, rng())
