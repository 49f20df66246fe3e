"""FVD: the distance against known numbers, the metric's states, and what may be called FVD."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.metrics.fvd import FrechetVideoDistance, frechet_distance, prepare
from models.i3d import HASSONY2, random_i3d

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


class Stub(nn.Module):
    """Called like i3d_torchscript.pt, and cheap: 400 block means."""

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        assert not rescale and not resize and return_features
        return F.adaptive_avg_pool3d(x, [4, 6, 6]).flatten(1)[:, :400]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("i3d") / "i3d_torchscript.pt"
    torch.jit.script(Stub()).save(str(path))
    return path


@pytest.fixture
def metric(archive):
    return FrechetVideoDistance(archive, chunk=3)


@pytest.fixture(scope="module")
def network():
    return random_i3d()


def clips(n, seed, f=9, size=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, f, size, size), dtype=torch.uint8, generator=generator)


def normal(n, d, seed):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# The distance


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


# The metric's states


def test_streamed_permuted_and_merged_equal_one_batch(metric, archive):
    real, fake = clips(7, 0), clips(5, 1) // 2
    metric.update(real, real=True)
    metric.update(fake, real=False)
    expected = metric.compute()
    assert expected > 1

    first, second = FrechetVideoDistance(archive), FrechetVideoDistance(archive)
    first.update(real[[6, 2]], real=True)
    first.update(fake[[4, 0, 1]], real=False)
    first.update(real[[0, 3]], real=True)
    second.update(real[[5, 1, 4]], real=True)
    second.update(fake[[3, 2]], real=False)
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), expected, rtol=1e-5, atol=0)
    assert first.summary() == metric.summary()


def test_reset_forgets_clips_and_shapes(metric):
    metric.update(clips(2, 0), real=True)
    metric.reset()
    metric.update(clips(2, 0, f=10, size=8), real=True)
    assert metric.summary()["n_real"] == 2 and metric.summary()["resolution_real"] == "8x8"


def test_summary(metric, archive):
    metric.update(clips(3, 0, size=20), real=True)
    metric.update(clips(2, 1), real=False)
    summary = metric.summary()
    assert "224x224" in summary.pop("resize")
    assert summary == {
        "name": "fvd",
        "n_real": 3,
        "n_fake": 2,
        "frames": 9,
        "resolution_real": "20x20",
        "resolution_fake": "16x16",
        "weights": f"sha256:{sha256(archive)}",
    }


def test_the_network_is_no_part_of_the_checkpoint(metric):
    assert not list(metric.modules())[1:] and not list(metric.parameters()) and not metric.state_dict()


def test_preparation_is_the_reference():
    x = torch.zeros(2, 3, 9, 10, 30, dtype=torch.uint8)
    x[1, 2, 4] = 255
    y = prepare(x)
    assert y.shape == (2, 3, 9, 224, 224)
    assert (y[0] == -1).all() and torch.allclose(y[1, 2, 4], torch.tensor(1.0)) and (y[1, 2, 5] == -1).all()
    frame = clips(1, 0, size=224)
    torch.testing.assert_close(prepare(frame), frame / 127.5 - 1)


@pytest.mark.parametrize(
    "videos, message",
    [
        (torch.rand(1, 3, 9, 8, 8), "must be uint8 in 0..255, not float32"),
        (clips(1, 0)[:, :1], r"shape \(b, 3, f, h, w\), not \(1, 1, 9, 16, 16\)"),
        (clips(1, 0)[0], r"shape \(b, 3, f, h, w\)"),
        (clips(1, 0, f=8), "at least 9 frames, and these have 8"),
    ],
)
def test_bad_videos(metric, videos, message):
    with pytest.raises(ValueError, match=message):
        metric.update(videos, real=True)


def test_lengths_and_sizes_do_not_mix(metric):
    metric.update(clips(2, 0), real=True)
    with pytest.raises(ValueError, match="9 frames came first, now 10"):
        metric.update(clips(2, 0, f=10), real=False)
    with pytest.raises(ValueError, match="16x16 came first, now 8x8"):
        metric.update(clips(2, 0, size=8), real=True)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_too_few_clips(metric):
    with pytest.raises(ValueError, match="two generated clips, and there are 0 and 0"):
        metric.compute()
    metric.update(clips(2, 0), real=True)
    metric.update(clips(1, 1), real=False)
    with pytest.raises(ValueError, match="there are 2 and 1"):
        metric.compute()


# What may be called FVD


def test_without_weights_it_is_fvd_random():
    state = torch.get_rng_state()
    metric = FrechetVideoDistance(chunk=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert metric.name == "fvd_random"
    assert metric.summary()["weights"] == "fixed-seed random network"
    bright = clips(2, 0)
    metric.update(bright, real=True)
    metric.update(bright // 4, real=False)
    assert metric.compute() > 1
    assert frechet_distance(metric.real[0], metric.real[0]) < 1e-6
    assert not metric.real[0].requires_grad


def test_weights_of_videogpt_and_tats(network, tmp_path):
    old = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    path = tmp_path / "i3d_pretrained_400.pt"
    torch.save(old, path)
    state = torch.get_rng_state()
    metric = FrechetVideoDistance(path, sha256=sha256(path).upper())
    assert torch.equal(torch.get_rng_state(), state)
    assert metric.name == "fvd" and metric.summary()["weights"] == f"sha256:{sha256(path)}"
    assert metric.network.logits.conv3d.weight.equal(network.logits.conv3d.weight)
    assert metric.network.Mixed_3b.b0.bn.eps == 1e-5 and not metric.network.training


def test_weights_of_hassony2(network, tmp_path):
    weights = network.state_dict()
    for theirs, ours in HASSONY2.items():
        weights = {key.replace(ours, theirs): value for key, value in weights.items()}
    assert "mixed_4d.branch_2.1.batch3d.weight" in weights
    torch.save(weights, tmp_path / "h.pt")
    metric = FrechetVideoDistance(tmp_path / "h.pt")
    assert metric.name == "fvd" and metric.network.Mixed_3b.b0.bn.eps == 1e-3
    assert metric.network.Mixed_4d.b2b.conv3d.weight.equal(network.Mixed_4d.b2b.conv3d.weight)


def test_rgb_imagenet_is_refused(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "rgb_imagenet.pt")
    with pytest.raises(ValueError, match="344 entries of .*rgb_imagenet.pt, whose distances are not FVD"):
        FrechetVideoDistance(tmp_path / "rgb_imagenet.pt")


def test_a_wrong_digest_names_both(archive):
    with pytest.raises(ValueError, match=f"SHA-256 {sha256(archive)}, but {'0' * 64} was expected"):
        FrechetVideoDistance(archive, sha256="0" * 64)


def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no I3D weight file"):
        FrechetVideoDistance(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="without the weight file"):
        FrechetVideoDistance(sha256="0" * 64)
    (tmp_path / "text.pt").write_text("not found")
    with pytest.raises(ValueError, match="not a weight file"):
        FrechetVideoDistance(tmp_path / "text.pt")
    torch.save({"state_dict": {}}, tmp_path / "wrapped.pt")
    with pytest.raises(ValueError, match="not a plain dictionary"):
        FrechetVideoDistance(tmp_path / "wrapped.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="entries do not fit"):
        FrechetVideoDistance(tmp_path / "other.pt")
