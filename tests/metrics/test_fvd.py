"""FVD and KVD: their states, their features, and what may be called by these names."""

import hashlib
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_modules.metrics import FrechetVideoDistance, KernelVideoDistance, frechet_distance, kernel_distance
from lightning_modules.metrics import i3d as features
from lightning_modules.metrics.i3d import RESIZE, load_i3d, logits_of, prepare
from models.i3d import HASSONY2, I3D, random_i3d

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


class Stub(nn.Module):
    """Called like i3d_torchscript.pt, and cheap: 400 block means."""

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        assert rescale == resize and return_features
        if rescale:
            x = x / 127.5 - 1
        return F.adaptive_avg_pool3d(x, [4, 6, 6]).flatten(1)[:, :400]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def taken_for_published(monkeypatch):
    """Lets weights of our own pass for the published ones."""
    monkeypatch.setattr(features, "black_to_white", lambda net: features.BLACK_TO_WHITE)


BLACK_TO_WHITE_OF = features.black_to_white


@pytest.fixture
def not_published(taken_for_published, monkeypatch):
    """Weights are what they are."""
    monkeypatch.setattr(features, "black_to_white", BLACK_TO_WHITE_OF)


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


# The metric's states


def test_streamed_permuted_and_merged_equal_one_batch(metric, archive):
    real, fake = clips(7, 0), clips(5, 1) // 2
    metric.update(real, real=True)
    metric.update(fake, real=False)
    expected = metric.compute()
    assert expected > 1

    assert expected == frechet_distance(metric.rows("real"), metric.rows("fake"))
    first, second = FrechetVideoDistance(archive), FrechetVideoDistance(archive)
    first.update(real[[6, 2]], real=True)
    first.update(fake[[4, 0, 1]], real=False)
    first.update(real[[0, 3]], real=True)
    second.update(real[[5, 1, 4]], real=True)
    second.update(fake[[3, 2]], real=False)
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), expected, rtol=1e-5, atol=0)
    assert first.summary() == metric.summary()
    assert first.interval(resamples=50) == pytest.approx(metric.interval(resamples=50), rel=1e-5)


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


def test_kvd_has_the_states_of_fvd_and_the_network_runs_once(archive, monkeypatch):
    calls = []
    monkeypatch.setattr(features, "logits_of", lambda *args: calls.append(1) or logits_of(*args))
    both = MetricCollection(
        {"fvd": FrechetVideoDistance(archive), "kvd": KernelVideoDistance(archive)}, compute_groups=[["fvd", "kvd"]]
    )
    real, fake = clips(5, 0), clips(4, 1) // 2
    both.update(real, real=True)
    both.update(fake, real=False)
    assert len(calls) == 2
    alone = KernelVideoDistance(archive)
    alone.update(fake, real=False)
    alone.update(real, real=True)
    values = both.compute()
    assert values["kvd"] == alone.compute() == kernel_distance(alone.rows("real"), alone.rows("fake"))[0]
    assert values["fvd"] == frechet_distance(alone.rows("real"), alone.rows("fake"))
    assert both["kvd"].summary() == alone.summary() and alone.summary()["name"] == "kvd"
    assert both["kvd"].interval(resamples=20) == alone.interval(resamples=20)
    assert list(both["fvd"]._defaults) == list(alone._defaults)
    assert KernelVideoDistance().name == "kvd_random"


def test_resize_variants_are_named(archive, metric):
    frames = clips(1, 3, size=32)[..., :24]
    reference = prepare(frames)
    for resize in RESIZE:
        if resize == "inside":
            continue
        other = FrechetVideoDistance(archive, resize=resize)
        assert other.name == ("fvd" if resize == "bilinear" else f"fvd_{resize}")
        assert other.summary()["resize"] == RESIZE[resize]
        assert prepare(frames, resize).shape == reference.shape
    wide = torch.zeros(1, 3, 9, 448, 896, dtype=torch.uint8)
    wide[..., 224:-224] = 255  # the middle square
    assert (prepare(wide, "short_side")[..., 1:-1] == 1).all() and (prepare(wide).mean() < 0.1)
    large = clips(1, 0, f=9, size=448)
    smooth = F.avg_pool3d(large.float(), (1, 2, 2)) / 127.5 - 1
    assert (prepare(large) - smooth).abs().max() < 1e-5  # 2:1 at half pixels is the mean of four
    assert (prepare(large, "antialias") - smooth).abs().mean() > 0.05
    inside = FrechetVideoDistance(archive, resize="inside")
    assert inside.name == "fvd_inside"
    black = clips(2, 0) // 8
    expected = F.adaptive_avg_pool3d(black / 127.5 - 1, [4, 6, 6]).flatten(1)[:, :400]
    torch.testing.assert_close(inside.features(black), expected)
    with pytest.raises(ValueError, match="'bicubic' is not one of bilinear, antialias, short_side, inside"):
        FrechetVideoDistance(resize="bicubic")
    with pytest.raises(ValueError, match="Only i3d_torchscript.pt can resize inside"):
        FrechetVideoDistance(resize="inside")


def test_features_do_not_depend_on_the_batch(network):
    metric = FrechetVideoDistance(chunk=1)
    one = metric.features(clips(2, 5))
    metric.chunk = 2
    torch.testing.assert_close(metric.features(clips(2, 5)), one, rtol=1e-4, atol=1e-4)
    plain = I3D(eps=1e-3)
    plain.load_state_dict(network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(prepare(clips(2, 5))), one, rtol=1e-4, atol=1e-4)


def test_features_are_whole_float32_whatever_training_has_set(archive, monkeypatch):
    seen = []

    def noting(*args):
        seen.append((torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return logits_of(*args)

    monkeypatch.setattr(features, "logits_of", noting)
    before = torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", torch.bfloat16):
        assert FrechetVideoDistance(archive).features(clips(1, 0)).dtype == torch.float32
    assert seen == [(False, False, False)] and torch.backends.cudnn.allow_tf32 == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the same features on a GPU: there is none here")
def test_features_do_not_depend_on_the_device():
    metric = FrechetVideoDistance()
    here = metric.features(clips(2, 5))
    torch.testing.assert_close(metric.to("cuda").features(clips(2, 5)).cpu(), here, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "videos, message",
    [
        (torch.eye(8).expand(1, 3, 9, 8, 8), "must be uint8 in 0..255, not float32 from 0 to 1"),
        (torch.full((1, 3, 9, 8, 8), torch.nan), "must be uint8 in 0..255, not float32, some of them NaN"),
        (clips(1, 0).long(), "must be uint8 in 0..255, not int64"),
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
    low, high = metric.interval(resamples=50)
    assert low < metric.compute() < high
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
    assert metric.network.logits.conv3d.weight.equal(network.logits.conv3d.weight) and not metric.network.training
    assert_folded(metric.network, network, eps=1e-5)


def test_weights_of_hassony2(network, tmp_path):
    weights = network.state_dict()
    for theirs, ours in HASSONY2.items():
        weights = {key.replace(ours, theirs): value for key, value in weights.items()}
    assert "mixed_4d.branch_2.1.batch3d.weight" in weights
    torch.save(weights, tmp_path / "h.pt")
    metric = FrechetVideoDistance(tmp_path / "h.pt")
    assert metric.name == "fvd"
    assert_folded(metric.network, network, eps=1e-3)


def assert_folded(folded, network, eps):
    """Each convolution is scaled by its norm with this eps."""
    for name in ("Conv3d_1a_7x7", "Mixed_4d.b2b", "Mixed_5c.b0"):
        unit, own = network.get_submodule(name), folded.get_submodule(name).conv3d.weight
        torch.testing.assert_close(own, unit.conv3d.weight / (1 + eps) ** 0.5, rtol=1e-6, atol=0)


def test_rgb_imagenet_is_refused(network, tmp_path, not_published):
    """It has the layout and the 287 entries of i3d_pretrained_400.pt: what it computes tells it apart."""
    weights = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "rgb_imagenet.pt")
    with pytest.raises(ValueError, match="rgb_imagenet.pt holds an I3D, but not that of FVD: .* instead of 152.9175"):
        FrechetVideoDistance(tmp_path / "rgb_imagenet.pt")
    named = FrechetVideoDistance(tmp_path / "rgb_imagenet.pt", rgb_imagenet=True)
    assert named.name == "frechet_rgb_imagenet"
    assert_folded(named.network, network, eps=1e-3)
    assert KernelVideoDistance(tmp_path / "rgb_imagenet.pt", rgb_imagenet=True).name == "kernel_rgb_imagenet"


def test_what_tells_the_weights_apart(archive, monkeypatch, not_published):
    with pytest.raises(ValueError, match=r"16 frames are 1600 apart"):  # 400 features of -1 and of 1
        FrechetVideoDistance(archive)
    monkeypatch.setattr(features, "BLACK_TO_WHITE", 1590)
    assert FrechetVideoDistance(archive).name == "fvd"
    monkeypatch.setattr(features, "BLACK_TO_WHITE", 152.9175)
    monkeypatch.setattr(features, "TORCHSCRIPT", sha256(archive))  # the known file needs no test
    assert FrechetVideoDistance(archive).name == "fvd"


def test_a_wrong_digest_names_both(archive):
    with pytest.raises(ValueError, match=f"SHA-256 {sha256(archive)}, but {'0' * 64} was expected"):
        FrechetVideoDistance(archive, sha256="0" * 64)


def test_files_that_are_no_weights(tmp_path, archive):
    with pytest.raises(FileNotFoundError, match="no I3D weight file"):
        FrechetVideoDistance(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="without the weight file"):
        FrechetVideoDistance(sha256="0" * 64)
    (tmp_path / "cut.pt").write_bytes(archive.read_bytes()[:-500])
    with pytest.raises(ValueError, match="not a weight file that PyTorch can read safely; it may be cut short"):
        FrechetVideoDistance(tmp_path / "cut.pt")
    (tmp_path / "text.pt").write_text("not found")
    with pytest.raises(ValueError, match="not a weight file"):
        FrechetVideoDistance(tmp_path / "text.pt")
    torch.save({"state_dict": {}}, tmp_path / "wrapped.pt")
    with pytest.raises(ValueError, match="not a plain dictionary"):
        FrechetVideoDistance(tmp_path / "wrapped.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="entries do not fit"):
        FrechetVideoDistance(tmp_path / "other.pt")


# With the published weights, where the environment says where they are


def published(variable):
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"set {variable} to the path of the published file to check its published numbers")
    return path


@pytest.mark.parametrize("variable", ["I3D_TORCHSCRIPT", "I3D_PRETRAINED_400"])
def test_black_and_white_videos_are_as_far_apart_as_published(variable, not_published):
    metric = FrechetVideoDistance(published(variable))
    rel = 0.01 if variable == "I3D_PRETRAINED_400" else 1e-4
    for frames, expected in ((10, 569.2296), (16, 152.9175), (30, 151.2565)):
        metric.reset()
        for real in (True, False):
            metric.update(torch.full((2, 3, frames, 64, 64), 0 if real else 255, dtype=torch.uint8), real)
        assert metric.compute().item() == pytest.approx(expected, rel=rel)


def test_the_comparison_of_implementations(not_published):
    path = features.Path(published("I3D_TORCHSCRIPT"))
    net, sets = load_i3d(path, ""), []
    for seed in (2, 1):
        videos = np.random.RandomState(seed).rand(128, 16, 224, 224, 3).astype(np.float32)
        with torch.no_grad():  # no rescaling: the network sees [0, 1]
            parts = [logits_of(net, torch.from_numpy(v).permute(0, 4, 1, 2, 3)) for v in np.split(videos, 16)]
        sets.append(torch.cat(parts))
    assert frechet_distance(*sets).item() == pytest.approx(10.138085, rel=2e-2)
