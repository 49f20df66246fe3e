"""The degradation of small pictures: true JPEG, all four kinds in every order, alike for the frames of a clip."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from datamodules import ImageTextDataModule
from lightning_modules.decoder import resized
from lightning_modules.degradation import DRAWS, blurred, bsr, grainy, jpeg, shrunk
from lightning_modules.draws import Draws
from lightning_modules.optim import OptimConfig
from lightning_modules.super_resolution import SuperResolutionModule
from models.diffusion import Diffusion, DiffusionConfig

PAIRS = Path(__file__).parents[2] / "experiments" / "demo" / "pairs"


@pytest.fixture(scope="module")
def pictures():
    """Six of the demo's stills, `6 3 192 192` in [-1, 1]."""
    return resized(ImageTextDataModule(str(PAIRS), 1, 256).preview(6)["image"] / 127.5 - 1, 192)


def error(a, b):
    return float((a - b).square().mean())


@pytest.mark.parametrize("quality", [10, 50, 80, 95])
def test_jpeg_is_that_of_an_encoder(pictures, quality):
    theirs = []
    for picture in pictures[..., :150]:  # a width that is no multiple of 16
        file = io.BytesIO()
        pixels = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        theirs.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 127.5 - 1)
    ours, theirs = jpeg(pictures[..., :150], quality), torch.stack(theirs)
    assert ours.shape == theirs.shape
    assert error(ours, pictures[..., :150]) == pytest.approx(error(theirs, pictures[..., :150]), rel=0.1)
    assert error(ours, theirs) < 0.25 * error(ours, pictures[..., :150])


def test_blur_widens_a_point_by_its_deviations():
    point = torch.zeros(1, 3, 21, 21)
    point[..., 10, 10] = 1
    spread = blurred(point, along=1.3, across=0.6, angle=torch.pi / 2)[0, 0]
    place = torch.arange(21) - 10.0
    assert spread.sum() == pytest.approx(1)
    assert (spread.sum(1) * place.square()).sum().sqrt() == pytest.approx(1.3, rel=0.02)  # along: downwards
    assert (spread.sum(0) * place.square()).sum().sqrt() == pytest.approx(0.6, rel=0.02)
    assert torch.allclose(blurred(point, 0.0, 0.0, 1.0), point, atol=1e-6)


def test_noise_is_grey_or_coloured_and_of_its_deviation():
    still, noise = torch.zeros(2, 3, 32, 32), torch.randn(2, 3, 64, 64)
    grey, coloured = grainy(still, noise, 0.1, True), grainy(still, noise, 0.1, False)
    assert torch.equal(grey[:, 0], grey[:, 2]) and not torch.equal(coloured[:, 0], coloured[:, 2])
    assert grey.std() == pytest.approx(0.1, rel=0.1) and coloured.std() == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(grey[0], grey[1])


def test_shrinking_ends_at_the_side_with_each_filter(pictures):
    plain = resized(pictures, 64)
    for which in (0.0, 0.4, 0.9):
        kind = shrunk(pictures, 64, 0.0, which, which)
        assert kind.shape == plain.shape and 1e-6 < error(kind, plain) + 1e-5 < 0.05
        assert error(shrunk(pictures, 64, 0.99, which, which), plain) > error(kind, plain)  # by way of half of it


def test_a_batch_is_degraded_each_in_its_way(pictures):
    clips = pictures[:1, :, None].expand(64, -1, 2, -1, -1)  # one still, 64 times
    draws, noise = torch.rand(64, DRAWS), torch.randn_like(clips)
    small = bsr(clips, 3, draws, noise)
    assert small.shape == (64, 3, 2, 64, 64) and small.abs().max() <= 1
    errors = (small - resized(clips, 64)).square().flatten(1).mean(1)
    assert len(errors.unique()) == 64 and errors.max() > 10 * errors.min() > 0
    # the order matters: the strengths of one with each kind first in turn
    orders = draws[:1].repeat(4, 1)
    orders[:, :4] = 1 - torch.eye(4)
    each = bsr(clips[:4], 3, orders, noise[:1].expand_as(noise[:4]))
    assert all(not torch.equal(each[i], each[j]) for i in range(4) for j in range(i))
    assert torch.equal(bsr(clips[7:8], 3, draws[7:8], noise[7:8]), small[7:8])  # not a matter of its batch


def test_frames_differ_by_nothing_but_their_noise(pictures):
    clips = pictures[:4, :, None].expand(-1, -1, 3, -1, -1)
    small = bsr(clips, 3, torch.rand(4, DRAWS), torch.zeros_like(clips))
    assert torch.equal(small[:, :, 0], small[:, :, 2])
    small = bsr(clips, 3, torch.rand(4, DRAWS), torch.randn_like(clips))
    assert not torch.equal(small[:, :, 0], small[:, :, 2])


def test_every_number_that_is_drawn_changes_the_picture(pictures):
    middle = torch.full((1, DRAWS), 0.5)
    middle[0, :4] = torch.tensor([0.1, 0.3, 0.5, 0.7])  # blur, resizing, noise, JPEG
    middle[0, 4:7] = torch.tensor([0.6, 0.9, 0.2])  # an oval blur
    clip, noise = pictures[1:2, :, None], torch.randn(1, 3, 1, 192, 192)
    plain = bsr(clip, 3, middle, noise)
    for i in range(DRAWS):
        for value in (0.0, 0.95):
            other = middle.clone()
            other[0, i] = value
            if not torch.equal(bsr(clip, 3, other, noise), plain):
                break
        else:
            raise AssertionError(f"number {i} changes nothing")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_sr_sees_what_was_degraded(unet, precision):
    net = unet(low_res=True)
    module = SuperResolutionModule(
        net, Diffusion(DiffusionConfig()), OptimConfig(), factor=2, max_noise_level=1, degradation="bsr"
    )
    seen = []
    net.register_forward_hook(lambda net, args, kwargs, output: seen.append(kwargs["low_res"]), with_kwargs=True)
    x0 = torch.rand(3, 3, 1, 16, 16) * 2 - 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        module.loss({"image": ((x0[:, :, 0] + 1) * 127.5).round().byte(), "seed": [1, 2, 3]})
    draws = Draws({"seed": [1, 2, 3]}, 3, torch.device("cpu"))
    clean = ((x0 + 1) * 127.5).round() / 127.5 - 1
    decisions = torch.cat([torch.rand(1, DRAWS, generator=each) for each in draws.generators])
    small = bsr(clean, 2, decisions, draws.noise(clean))[:, :, 0]
    large = F.interpolate(small, (16, 16), mode="bilinear", align_corners=False)
    assert error(seen[0][:, :, 0], large) < 1e-3 < error(F.interpolate(resized(clean[:, :, 0], 8), (16, 16)), large)
    with pytest.raises(ValueError, match="'bsrgan' is not one of blur, bsr"):
        SuperResolutionModule(net, Diffusion(DiffusionConfig()), OptimConfig(), factor=2, degradation="bsrgan")
