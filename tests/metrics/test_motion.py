"""Motion and its correlation over time, on clips of which both are known."""

import pytest
import torch
from torch import Tensor

from lightning_modules.metrics.motion import Motion


def scores(clips: Tensor) -> tuple[float, float]:
    metric = Motion()
    metric.update(clips)
    return float(metric.compute()), float(metric.correlation())


def test_a_still_has_none() -> None:
    still = torch.randint(0, 256, (2, 3, 1, 16, 16), dtype=torch.uint8).expand(-1, -1, 8, -1, -1)
    assert scores(still) == (0.0, 0.0)


def test_frames_that_have_nothing_in_common_correlate_by_minus_one_half() -> None:
    torch.manual_seed(0)
    noise = torch.randint(0, 256, (4, 3, 16, 32, 32), dtype=torch.uint8)
    motion, correlation = scores(noise)
    assert motion == pytest.approx(256 / 3, rel=0.01)  # E |x - y| of two uniform variables
    assert correlation == pytest.approx(-0.5, abs=0.01)


def test_a_steady_fade_correlates_by_one() -> None:
    fade = (10 * torch.arange(8)).view(1, 1, 8, 1, 1).expand(1, 3, 8, 16, 16).to(torch.uint8)
    assert scores(fade) == pytest.approx((10.0, 1.0))


def test_smooth_motion_correlates_more_than_flicker() -> None:
    x = torch.arange(64).view(1, 1, 1, 1, 64).expand(1, 3, 16, 64, 64)
    step = torch.arange(16).view(1, 1, 16, 1, 1)
    drift = (127.5 + 127.5 * torch.sin((x - 2 * step) * 2 * torch.pi / 64)).to(torch.uint8)
    motion, correlation = scores(drift)
    assert motion > 10 and correlation > 0.9
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert scores(drift[:, :, order])[1] < 0.2


def test_it_gathers_and_says_what_it_is_of() -> None:
    torch.manual_seed(0)
    clips = torch.randint(0, 256, (6, 3, 5, 8, 8), dtype=torch.uint8)
    metric = Motion()
    for part in clips.split(4):
        metric.update(part)
    assert (float(metric.compute()), float(metric.correlation())) == pytest.approx(scores(clips))
    low, high = metric.interval()
    assert low < float(metric.compute()) < high
    assert metric.summary() == {"name": "motion", "n": 6, "frames": 5, "resolution": "8x8"}


def test_two_frames_have_no_correlation() -> None:
    with pytest.raises(ValueError, match="at least 3 frames"):
        Motion().update(torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at least one clip"):
        Motion().compute()
