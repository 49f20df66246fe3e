"""FID and CLIP-FID: the distance of all frames from their sums, resize variants, names."""

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.metrics import CLIPFrechetDistance, FrechetInceptionDistance, frechet_distance
from lightning_modules.metrics import fid as module
from lightning_modules.metrics.distances import frechet_influences
from lightning_modules.metrics.fid import RESIZE, keys, prepare
from models.inception import random_inception


class Blocks:
    """An encoder of 3 x 2 x 2 block means: 12 features."""

    name = "blocks"

    def image_features(self, images):
        assert images.dtype == torch.uint8
        return F.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def clips(n, seed, f=3, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, f, size, size), dtype=torch.uint8, generator=generator)


def frames(videos):
    return Blocks().image_features(videos.transpose(1, 2).flatten(0, 1))


def test_the_distance_is_that_of_all_frames():
    real, fake = clips(40, 0), clips(30, 1) // 2
    metric = CLIPFrechetDistance(Blocks(), chunk=7)
    for part in real.split(9):
        metric.update(part, real=True)
    metric.update(fake, real=False)
    torch.testing.assert_close(metric.compute(), frechet_distance(frames(real), frames(fake)))
    assert metric.name == "clip_fid"
    summary = metric.summary()
    assert summary["n_real"] == 40 and summary["n_fake"] == 30 and summary["frames"] == 3
    assert summary["backbone"] == "blocks" and "bicubic" in summary["resize"]
    for kind, videos in (("real", real), ("fake", fake)):
        assert getattr(metric, f"n_{kind}") == len(videos)
    # and its derivative by a clip's weight is the sum over the clip's frames, of equal mean
    _, (by_real, by_fake) = metric.influences()
    _, expected = frechet_influences(frames(real), frames(fake))
    order = metric.kept("real")[0].sum((1, 2)).argsort()
    by_clip = (expected[0] - expected[0].mean()).view(40, 3).sum(1)[frames(real).view(40, -1).sum(1).argsort()]
    torch.testing.assert_close(by_real[order], by_clip, rtol=1e-4, atol=1e-4)
    low, high = metric.interval()
    assert low < metric.compute() < high and len(by_fake) == 30


def test_fewer_frames_than_features():
    real, fake = clips(2, 0, f=1), clips(3, 1, f=1)
    metric = CLIPFrechetDistance(Blocks())
    metric.update(real, real=True)
    metric.update(fake, real=False)
    torch.testing.assert_close(metric.compute(), frechet_distance(frames(real), frames(fake)))


def test_memory_does_not_grow_with_frames(monkeypatch):
    """Beyond the clips kept for the interval, whichever order they come in; their interval is that of all."""
    monkeypatch.setattr(module, "KEPT", 20)
    real, fake = clips(200, 0), clips(210, 1) // 2
    metric, other = CLIPFrechetDistance(Blocks()), CLIPFrechetDistance(Blocks())
    for start in range(0, 200, 10):
        metric.update(real[start : start + 10], real=True)
        assert sum(len(part) for part in metric.real_kept) <= 40 * 3
    metric.update(fake, real=False)
    other.update(fake.flip(0), real=False)
    for i in torch.randperm(200, generator=torch.Generator().manual_seed(0)).split(33):
        other.update(real[i], real=True)
    torch.testing.assert_close(other.compute(), metric.compute())
    assert other.interval() == pytest.approx(metric.interval(), rel=1e-6)
    assert len(metric.kept("real")[0]) == 20
    monkeypatch.setattr(module, "KEPT", 1000)
    whole = CLIPFrechetDistance(Blocks())
    whole.update(real, real=True)
    whole.update(fake, real=False)
    (low, high), (least, most) = metric.interval(resamples=3000), whole.interval(resamples=3000)
    assert 0.6 < (high - low) / (most - least) < 1.6


def test_keys_are_of_the_bytes():
    videos = clips(100, 0)
    found = keys(videos)
    assert torch.equal(keys(videos[7:9]), found[7:9])
    assert len(found.unique(dim=0)) == 100 and found.max() < 2**16
    assert (found[:, 0] < 2**15).float().mean() == pytest.approx(0.5, abs=0.2)


def test_resize_variants_are_named():
    images = clips(1, 0, f=1, size=12)[:, :, 0]
    for resize, text in RESIZE.items():
        metric = FrechetInceptionDistance(resize=resize)
        assert metric.name == ("fid_random" if resize == "bilinear" else f"fid_random_{resize}")
        assert metric.summary()["resize"] == text and prepare(images, resize).shape == (1, 3, 299, 299)
    reference = F.interpolate(images / 127.5 - 1, (299, 299), mode="bilinear", align_corners=False)
    torch.testing.assert_close(prepare(images, "bilinear"), reference, rtol=1e-4, atol=1e-5)
    ramp = torch.arange(12, dtype=torch.uint8).mul(10).expand(1, 3, 12, 12)  # 10 i at pixel i
    expected = (torch.arange(299) * 12 / 299 * 10).clamp(max=110)  # TensorFlow 1 samples at i * 12 / 299
    torch.testing.assert_close(prepare(ramp, "tensorflow")[0, 0, 5], (expected - 128) / 128, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prepare(ramp.mT, "tensorflow")[0, 0, :, 5], (expected - 128) / 128, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'lanczos' is not one of bilinear, tensorflow, antialias"):
        FrechetInceptionDistance(resize="lanczos")


def test_fid_by_inception(tmp_path):
    weights = random_inception(seed=4).state_dict() | {
        "fc.weight": torch.zeros(1008, 2048),
        "fc.bias": torch.zeros(1008),
    }
    torch.save(weights, tmp_path / "inception.pth")
    with pytest.raises(ValueError, match="but 6726825d.* was expected"):
        FrechetInceptionDistance(tmp_path / "inception.pth")
    digest = module.located(tmp_path / "inception.pth", None, "")[1]
    metric = FrechetInceptionDistance(tmp_path / "inception.pth", digest)
    assert metric.name == "fid" and metric.summary()["weights"] == f"sha256:{digest}"
    assert metric.network.Mixed_7c.branch_pool.conv.weight.equal(weights["Mixed_7c.branch_pool.conv.weight"])
    assert not any(key.startswith("network") for key in metric.state_dict()) and not list(metric.parameters())
    real, fake = clips(2, 0, f=2), clips(2, 1, f=2) // 3
    metric.update(real, real=True)
    metric.update(fake, real=False)
    with torch.no_grad():
        sets = [metric.network(prepare(videos.transpose(1, 2).flatten(0, 1), "bilinear")) for videos in (real, fake)]
    assert metric.compute().item() == pytest.approx(frechet_distance(*sets).item(), rel=1e-4)
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth does not hold the weights of the FID's Inception"):
        module.load_inception(tmp_path / "other.pth")


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_bad_input():
    metric = CLIPFrechetDistance(Blocks())
    with pytest.raises(ValueError, match="clip_fid needs at least two real and two generated clips, .* 0 and 0"):
        metric.compute()
    metric.update(clips(2, 0), real=True)
    with pytest.raises(ValueError, match="3 frames came first, now 4"):
        metric.update(clips(2, 0, f=4), real=False)
    with pytest.raises(ValueError, match="8x8 came first, now 6x6"):
        metric.update(clips(2, 0, size=6), real=True)
    with pytest.raises(ValueError, match="must be uint8 in 0..255"):
        metric.update(clips(2, 0) / 255, real=False)
    metric.update(clips(1, 0), real=False)
    with pytest.raises(ValueError, match="there are 2 and 1"):
        metric.interval()
    with pytest.raises(ValueError, match="without the weight file"):
        FrechetInceptionDistance(sha256="0" * 64)
