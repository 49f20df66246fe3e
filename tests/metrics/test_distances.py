"""Distances of features: known numbers, closed forms, and intervals that hold what they should."""

import numpy as np
import pytest
import torch

from lightning_modules.metrics import FrechetVideoDistance
from lightning_modules.metrics.distances import (
    Moments,
    frechet_distance,
    frechet_influences,
    frechet_of_moments,
    kernel_distance,
    moment_influences,
)
from lightning_modules.metrics.video_metric import bootstrap


def normal(n, d, seed):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n, expected", [(2048, 102.60164), (300, 396.18042), (64, 760.7294)])
def test_reference_numbers(n, expected):
    r = np.random.RandomState(0)
    x, y = r.randn(n, 400), r.randn(n, 400) * 1.3 + 0.2
    distance = frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert distance.item() == pytest.approx(expected, rel=1e-7)


def test_a_set_is_at_no_distance_from_itself():
    x = normal(64, 400, 0)
    assert 0 <= frechet_distance(x, x) < 1e-11
    assert 0 <= frechet_distance(x, x[torch.randperm(64)]) < 1e-11


def test_closed_forms():
    x, v = normal(50, 8, 0), torch.arange(8.0).double()
    torch.testing.assert_close(frechet_distance(x, x + v), v.square().sum())
    white = torch.linalg.qr(x - x.mean(0)).Q * 49**0.5  # mean 0 and covariance I, exactly
    torch.testing.assert_close(frechet_distance(white, 2 * white), torch.tensor(8.0).double())
    few = x[:5]  # fewer clips than features: S_y = 9 S_x, so Tr S_x (1 + 9 - 2 * 3)
    expected = 4 * few.var(0).sum() + 4 * few.mean(0).square().sum()
    torch.testing.assert_close(frechet_distance(few, 3 * few), expected)


def test_against_the_matrix_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    x, y = normal(90, 12, 0), normal(70, 12, 1) @ normal(12, 12, 2)
    s_x, s_y = x.T.cov().numpy(), y.T.cov().numpy()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s_x + s_y - 2 * linalg.sqrtm(s_x @ s_y).real)
    assert frechet_distance(x, y).item() == pytest.approx(float(expected), rel=1e-9)
    torch.testing.assert_close(frechet_distance(x, y), frechet_distance(y, x))


def test_one_row_and_other_widths_are_refused():
    with pytest.raises(ValueError, match="at least two clips"):
        frechet_distance(normal(1, 4, 0), normal(5, 4, 1))
    with pytest.raises(ValueError, match=r"\(n, d\) and \(m, d\)"):
        frechet_distance(normal(5, 4, 0), normal(5, 3, 1))


# Moments: the same distance from sums


@pytest.mark.parametrize("n", [200, 9])
def test_moments_give_the_distance_of_the_rows(n):
    """Also with fewer rows than features, where covariances are singular."""
    x, y = normal(n, 16, 0), normal(n + 3, 16, 1) @ normal(16, 16, 2) + 1
    own, other = (Moments.of_sums(len(z), z.sum(0), z.T @ z) for z in (x, y))
    distance = frechet_of_moments(own, other)
    expected, (by_x, by_y) = frechet_influences(x, y)
    torch.testing.assert_close(distance, expected)
    torch.testing.assert_close(distance, frechet_distance(x, y))
    found = moment_influences(own, other, x, y)
    torch.testing.assert_close(found, [by_x, by_y], atol=1e-6, rtol=1e-6)
    assert frechet_of_moments(own, own) < 1e-9


def test_moments_of_one_point():
    """Black frames against white ones: no variance, the distance of the means."""
    black, white = torch.zeros(4, 3, dtype=torch.float64), torch.ones(5, 3, dtype=torch.float64)
    own, other = (Moments.of_sums(len(z), z.sum(0), z.T @ z) for z in (black, white))
    torch.testing.assert_close(frechet_of_moments(own, other).item(), 3.0)
    assert all(part.isfinite().all() for part in moment_influences(own, other, black, white))


# The kernel distance


def test_the_kernel_distance_by_hand():
    x, y = normal(7, 5, 0), normal(6, 5, 1) + 0.5

    def kernel(a, b):
        return (a @ b / 5 + 1) ** 3

    pairs = [kernel(x[i], x[j]) for i in range(7) for j in range(7) if i != j]
    others = [kernel(y[i], y[j]) for i in range(6) for j in range(6) if i != j]
    across = [kernel(a, b) for a in x for b in y]
    expected = sum(pairs) / 42 + sum(others) / 30 - 2 * sum(across) / 42
    torch.testing.assert_close(kernel_distance(x, y)[0], expected)
    torch.testing.assert_close(kernel_distance(y, x)[0], expected)


def test_the_kernel_distance_does_not_depend_on_blocks(monkeypatch):
    x, y = normal(50, 5, 0), normal(41, 5, 1)
    whole, influences = kernel_distance(x, y)
    monkeypatch.setattr("lightning_modules.metrics.distances.BLOCK", 7)
    parts, others = kernel_distance(x, y)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(others, influences)


def test_the_kernel_distance_is_unbiased():
    """Of equal distributions it scatters about zero; of a shift by v it is 3 |v|^2 / d and higher orders."""
    values = torch.stack([kernel_distance(normal(20, 4, i), normal(20, 4, 1000 + i))[0] for i in range(200)])
    assert (values < 0).any() and abs(values.mean()) < 3 * values.std() / 200**0.5
    # x.y/d + 1 cubed, with x = v + noise: E k = 1 + 3 m + 3 E(x.y/d)^2 + E(x.y/d)^3 in closed form for Gaussians
    v = torch.tensor([0.5, -0.5, 0.25, 0.0]).double()
    a = float(v @ v) / 4
    squares = {"xx": 1 / 4, "xy": 1 / 4 + a / 4, "yy": 1 / 4 + 2 * a / 4 + a**2}  # E (x.y/d)^2
    cubes = {"xx": 0.0, "xy": 0.0, "yy": a**3 + 3 * a * (1 / 4 + 2 * a / 4) + 6 * a / 16}
    means = {"xx": 0.0, "xy": 0.0, "yy": a}
    k = {p: 1 + 3 * means[p] + 3 * squares[p] + cubes[p] for p in means}
    expected = k["xx"] + k["yy"] - 2 * k["xy"]
    found = kernel_distance(normal(4000, 4, 5), normal(4000, 4, 6) + v)[0]
    assert found.item() == pytest.approx(expected, rel=0.1)


# Intervals


def test_influences_are_derivatives():
    """By the weight of a row, against the distance of covariances that are weighted so."""
    x, y = normal(30, 4, 0), normal(20, 4, 1) * 1.5 + 0.3
    _, (by_x, _) = frechet_influences(x, y)
    by_x = by_x - by_x.mean()

    def at(weights):
        w = weights / weights.sum() * 30
        mean = (w @ x) / 30
        z = (x - mean) * w.sqrt()[:, None] / 29**0.5
        v = (y - y.mean(0)) / 19**0.5
        trace = torch.linalg.svdvals(z @ v.T).sum()
        return (mean - y.mean(0)).square().sum() + z.square().sum() + v.square().sum() - 2 * trace

    ones = torch.ones(30, dtype=torch.float64)
    for i in (0, 7, 29):
        step = torch.zeros(30, dtype=torch.float64)
        step[i] = 1e-4
        slope = (at(ones + step) - at(ones - step)) / 2e-4
        torch.testing.assert_close(slope, by_x[i], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("distance", ["frechet", "kernel"])
def test_intervals_cover_what_they_say(distance):
    """N(0, I) against N(v, 4 I), 100 clips each: in about 95 of 100 draws the interval holds the mean distance.

    What the interval is of is the distance of this many clips, whose mean is taken over draws; that it tends to the
    closed form |v|^2 + d is tested above.
    """
    values, held = [], []
    for i in range(200):
        x, y = normal(100, 4, i), 2 * normal(100, 4, 5000 + i) + 1
        value, influences = frechet_influences(x, y) if distance == "frechet" else kernel_distance(x, y)
        values.append(value.item())
        held.append(bootstrap(value.item(), influences, 0.95, 400, seed=i))
    mean = np.mean(values)
    covered = np.mean([low <= mean <= high for low, high in held])
    assert 0.9 <= covered <= 0.99
    if distance == "frechet":
        assert mean == pytest.approx(8, rel=0.05)  # |v|^2 + d, and a little for the bias


def test_intervals_are_not_narrow_when_clips_are_fewer_than_features():
    """The half width against the true deviation over draws; it errs to the wide side."""
    values, widths = [], []
    for i in range(40):
        x, y = normal(32, 100, i), 1.3 * normal(32, 100, 900 + i) + 0.2
        value, influences = frechet_influences(x, y)
        low, high = bootstrap(value.item(), influences, 0.95, 300, seed=0)
        values.append(value.item())
        widths.append((high - low) / 2 / 1.96)
    assert 0.85 < np.mean(widths) / np.std(values) < 2


def test_a_level_is_a_share():
    with pytest.raises(ValueError, match="between 0 and 1, and it is 95"):
        bootstrap(1.0, [torch.ones(4)], 95, 10, 0)


def test_an_interval_does_not_go_below_what_a_distance_can_be():
    clips = torch.randint(0, 256, (3, 3, 9, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    metric = FrechetVideoDistance()
    metric.update(clips, real=True)
    metric.update(clips.flip(0), real=False)  # equal sets: the distance is 0
    low, high = metric.interval()
    assert low == 0 <= high
