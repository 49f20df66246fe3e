"""Every page's networks, narrowed but with its levels, blocks and switches: the identity at the start of time."""

import pytest
import torch
from einops import rearrange

from experiments import build
from experiments.config import load, sizes

FRAMES = 3
GROWN = [stage for stage, recipe in build.STAGES.items() if recipe.grows_from]


def narrow(size, stage):
    """The stage's network as its page has it, but for width; weights anew, temporal ones as they begin."""
    config = load(size)
    config.clip.model.embedding_width = 16
    config.decoder.unet.width, config.decoder.unet.head_width = 8, 8
    config.sr_low.unet.width = config.sr_high.unet.width = 8
    net = build.network(config, stage)
    with torch.no_grad():
        for key, p in net.named_parameters():
            if key not in net.temporal_keys():
                p.copy_(torch.randn_like(p) / (p[0].numel() ** 0.5 if p.ndim > 1 else 3))
    return net.eval()


def arguments(net, side):
    """Every condition that the network takes."""
    clip = torch.randn(1, 3, FRAMES, side, side)
    given = {"x": clip, "t": torch.tensor([400]), "fps": torch.tensor([7.3])}
    if net.config.embedding_width:
        given["embedding"] = torch.randn(1, 16)
    if net.config.low_res:
        given |= {"low_res": torch.randn_like(clip), "noise_level": torch.tensor([30])}
    if net.masked:
        given["given"] = torch.randn(1, 4, FRAMES, side, side)
    return given


def folded(given):
    return {
        k: rearrange(v, "1 c f h w -> f c 1 h w") if v.ndim == 5 else v.repeat_interleave(FRAMES, 0)
        for k, v in given.items()
    }


@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("stage", GROWN)
@pytest.mark.parametrize("size", sizes())
@torch.no_grad()
def test_a_clip_is_its_frames(size, stage, how):
    torch.manual_seed(0)
    net = narrow(size, stage)
    given = arguments(net, net.config.patch * 2 ** len(net.config.multiples))
    if how == "bfloat16":
        net = net.bfloat16()
        given = {k: v.bfloat16() if v.ndim > 1 else v for k, v in given.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        clip, frames = net(**given), net(**folded(given))
    assert clip.isfinite().all() and clip.float().std() > 0.05
    assert torch.equal(clip, rearrange(frames, "f c 1 h w -> 1 c f h w"))


@pytest.mark.parametrize("stage", GROWN)
@pytest.mark.parametrize("size", sizes())
def test_a_still_is_the_image_networks_and_time_learns_from_step_one(size, stage):
    torch.manual_seed(0)
    net = narrow(size, stage)
    given = arguments(net, net.config.patch * 2 ** len(net.config.multiples))
    image = type(net)(net.config).eval()
    image.load_state_dict({k: v for k, v in net.state_dict().items() if k not in net.temporal_keys()})
    still = {k: v[:, :, 0] if v.ndim == 5 else v for k, v in given.items() if k not in ("given", "fps")}
    with torch.no_grad():
        assert torch.equal(net(**still), image(**still))
    net(**given).square().sum().backward()
    for key in net.temporal_keys():
        waits = any(part in key for part in (".temporal.norm.", ".to_q.", ".to_k.", ".to_v.", "fps.0."))
        grad = net.get_parameter(key).grad
        assert grad is not None and (waits or grad.any()), key
