"""Random weights, and a CLIP small enough for a test."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.cascade import CascadeConfig, MakeAVideo, SamplingConfig, Stage
from models.clip import Clip, ClipConfig, build_clip
from models.diffusion import Diffusion, DiffusionConfig
from models.prior import Prior, PriorConfig
from models.unet import UNet, UNetConfig

SMALL_CLIP = ClipConfig(
    embedding_width=16,
    image_size=16,
    patch_size=8,
    context_length=12,
    vision_width=16,
    vision_layers=1,
    text_width=16,
    text_layers=1,
    head_width=8,
)

SHAPE = UNetConfig(width=8, multiples=[1, 2], blocks=1, attention=[2], head_width=8, embedding_width=16)
UPSAMPLER = replace(SHAPE, embedding_width=0, low_res=True, attention=[])
CONFIG = CascadeConfig(
    prior=SamplingConfig("ddpm", 3, 2.0),
    decoder=SamplingConfig("ddpm", 2, 2.0),
    interpolation=SamplingConfig("ddpm", 2),
    sr_low=SamplingConfig("ddim", 2, noise_level=200),
    sr_high=SamplingConfig("ddpm", 2, noise_level=200),
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def randomise() -> Callable[..., nn.Module]:
    """randomise(net, but=keys): weights drawn anew, none of them zero or one, activations of ordinary size."""

    def do(net: nn.Module, but: frozenset[str] | set[str] = frozenset()) -> nn.Module:
        with torch.no_grad():
            for key, p in net.named_parameters():
                if key in but:
                    continue
                noise = torch.randn_like(p)
                if p.ndim > 1:
                    p.copy_(noise / p[0].numel() ** 0.5)
                else:
                    p.copy_(noise * 0.3 + (1 if "norm" in key and key.endswith("weight") else 0))
        return net

    return do


@pytest.fixture(scope="session")
def clip() -> Clip:
    generator_state = torch.get_rng_state()
    torch.manual_seed(1)
    small = Clip(build_clip(SMALL_CLIP), "small", config=SMALL_CLIP)
    torch.set_rng_state(generator_state)
    return small


def calm(net: nn.Module, randomise) -> nn.Module:
    """Random everywhere, but with outputs that seldom leave [-1, 1], where clipping would hide differences."""
    randomise(net)
    with torch.no_grad():
        net.conv_out.spatial.weight.mul_(0.2)
    return net


@pytest.fixture
def cascade(clip, randomise):
    process = Diffusion(DiffusionConfig(prediction="x0"))
    shape = PriorConfig(width=16, depth=1, head_width=16, embedding_width=16, context_length=12)
    return MakeAVideo(
        clip,
        prior=Stage(randomise(Prior(shape)), process),
        decoder=Stage(calm(UNet(SHAPE, temporal=True), randomise), process, 8),
        interpolation=Stage(calm(UNet(SHAPE, temporal=True, masked=True), randomise), process, 8),
        sr_low=Stage(calm(UNet(UPSAMPLER, temporal=True), randomise), process, 12),
        sr_high=Stage(calm(UNet(UPSAMPLER), randomise), process, 16),
        config=replace(CONFIG),
    )
