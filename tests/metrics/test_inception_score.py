"""Video inception score: closed forms, splits, what may be called IS."""

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from lightning_modules.metrics import VideoInceptionScore
from lightning_modules.metrics import inception_score as module
from lightning_modules.metrics.inception_score import kl_divergences
from models.c3d import C3D, CUBE, random_c3d


class Brightness(nn.Module):
    """A class for each grey level in steps of ten, with certainty."""

    def forward(self, x):
        level = ((x.mean((1, 2, 3, 4)) + 128) / 10).long().clamp(0, 100)
        return nn.functional.one_hot(level, 101).float() * 200


@pytest.fixture
def cheap(monkeypatch):
    monkeypatch.setattr(module, "random_c3d", Brightness)


def grey(levels, f=16):
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1, 1).expand(-1, 3, f, 8, 8)


def test_closed_forms():
    """k classes in equal shares, each clip of one with certainty: k. No certainty at all: 1."""
    p = torch.eye(101).repeat(3, 1)[:, :101]
    assert kl_divergences(p).mean().exp().item() == pytest.approx(101)
    assert kl_divergences(torch.full((5, 101), 1 / 101)).mean().exp().item() == pytest.approx(1)
    half = torch.zeros(4, 101)
    half[:2, 0], half[2:, :2] = 1, 0.5  # p(c) = 3/4, 1/4
    expected = np.exp((np.log(4 / 3) + 0.5 * np.log(2 / 3) + 0.5 * np.log(2)) / 2)
    assert kl_divergences(half).mean().exp().item() == pytest.approx(expected)


def test_the_score_of_a_stream(cheap):
    metric = VideoInceptionScore(splits=2)
    metric.update(grey([5, 105]))
    metric.update(grey([205, 5, 105, 205] * 10 + [5, 5]))
    value, summary = metric.compute(), metric.summary()
    assert 1.5 < value <= 3 and summary["n"] == 44 and summary["splits"] == 2 and summary["frames"] == 16
    assert summary["deviation"] > 0 and summary["weights"] == "fixed-seed random network"
    assert summary["name"] == metric.name == "is_random"
    low, high = metric.interval(resamples=200)
    assert low < value < high
    one = VideoInceptionScore(splits=1)
    one.update(grey([5, 105, 205] * 4))
    assert one.compute().item() == pytest.approx(3) and one.summary()["deviation"] == 0


def test_order_and_batches_do_not_matter(cheap):
    levels = [5, 15, 35, 35, 105, 205, 215, 225] * 3
    whole, parts = VideoInceptionScore(splits=3), VideoInceptionScore(splits=3)
    whole.update(grey(levels))
    for i in torch.randperm(24, generator=torch.Generator().manual_seed(0)).split(5):
        parts.update(grey([levels[k] for k in i]))
    torch.testing.assert_close(parts.compute(), whole.compute())
    assert parts.interval() == pytest.approx(whole.interval())
    other = VideoInceptionScore(splits=3, seed=1)
    other.update(grey(levels))
    assert other.compute() != whole.compute()  # another deal


def test_the_published_network(tmp_path):
    """tgan2's two files, with weights of our own: read, named, and computed as the network does it."""
    weights = random_c3d(seed=3).state_dict()
    theirs = {key.replace(".weight", "/W").replace(".bias", "/b"): value.numpy() for key, value in weights.items()}
    np.savez(tmp_path / "conv3d_deepnetA_ucf.npz", **theirs)
    cube = np.random.RandomState(0).rand(*CUBE).astype(np.float32) * 100
    np.savez(tmp_path / "mean2.npz", mean=cube)
    digest = hashlib.sha256((tmp_path / "mean2.npz").read_bytes()).hexdigest()
    metric = VideoInceptionScore(
        tmp_path / "conv3d_deepnetA_ucf.npz", splits=1, mean=tmp_path / "mean2.npz", mean_sha256=digest
    )
    assert metric.name == "is" and metric.summary()["weights"].endswith(f"mean cube sha256:{digest}")
    assert isinstance(metric.network, C3D) and not metric.state_dict() and not list(metric.parameters())
    videos = torch.randint(0, 256, (2, 3, 16, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    metric.update(videos)
    x = module.prepare(videos, torch.from_numpy(cube))
    net = random_c3d(seed=3)
    with torch.no_grad():
        torch.testing.assert_close(metric.rows("fake"), net(x).softmax(1), rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="both its weights and its mean cube"):
        VideoInceptionScore(tmp_path / "conv3d_deepnetA_ucf.npz")
    with pytest.raises(ValueError, match="mean2.npz does not hold the weights of C3D"):
        VideoInceptionScore(tmp_path / "mean2.npz", mean=tmp_path / "mean2.npz")
    np.savez(tmp_path / "other.npz", mean=cube[:, :8])
    with pytest.raises(ValueError, match="other.npz does not hold the mean cube"):
        module.load_mean(tmp_path / "other.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "mean2.npz").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut.npz is not an npz file of arrays"):
        module.load_mean(tmp_path / "cut.npz")


def test_pickles_are_not_read(tmp_path):
    np.savez(tmp_path / "w.npz", mean=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="is not an npz file of arrays"):
        module.load_mean(tmp_path / "w.npz")


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_bad_input(cheap):
    metric = VideoInceptionScore()
    with pytest.raises(ValueError, match="is_random needs at least 20 clips, and there are 0"):
        metric.compute()
    assert metric.summary()["deviation"] is None
    with pytest.raises(ValueError, match="clips of 16 frames, and these have 9"):
        metric.update(grey([5], f=9))
    with pytest.raises(ValueError, match="must be uint8 in 0..255, not float32 from 5 to 5"):
        metric.update(grey([5]).float())
    metric.update(grey([5]))
    with pytest.raises(ValueError, match="8x8 came first, now 4x4"):
        metric.update(grey([5])[..., :4, :4])
    with pytest.raises(ValueError, match="at least one split, not 0"):
        VideoInceptionScore(splits=0)
    with pytest.raises(ValueError, match="without the weight file"):
        VideoInceptionScore(sha256="0" * 64)
