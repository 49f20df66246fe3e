"""A network in tiles of frames: the same numbers, and never more frames at a time than stated."""

import pytest
import torch

from models.tiles import in_tiles
from models.unet import UNet, UNetConfig

UPSAMPLER = UNetConfig(width=8, multiples=[1, 2], blocks=1, attention=[], head_width=8, low_res=True)
ATTENTIVE = UNetConfig(width=8, multiples=[1, 2], blocks=1, attention=[2], head_width=8, embedding_width=16)


def frames_seen(net):
    """The largest number of frames that a convolution of the network has seen, as a list that grows."""
    seen = []

    def note(layer, args):
        x = args[0]
        seen.append(x.shape[0] if layer.kernel_size == (3, 3) else x.shape[0] * x.shape[2])

    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size != (1, 1):
            layer.register_forward_pre_hook(note)
    return seen


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tile", [1, 3, 7])
def test_tiles_give_what_the_whole_gives(randomise, tile, batch):
    net = randomise(UNet(UPSAMPLER, temporal=True)).eval()
    x, low = torch.randn(batch, 3, 23, 8, 8), torch.randn(batch, 3, 23, 8, 8)
    conditions = {"low_res": low, "noise_level": torch.zeros(batch), "fps": torch.full((batch,), 30.0)}
    t = torch.full((batch,), 300)
    with torch.inference_mode():
        whole = net(x, t, **conditions)
        seen = frames_seen(net)
        tiled = net(x, t, **conditions, tile=tile)
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=1e-5)
    assert max(seen) == batch * (tile + 4)  # two frames more on either side


def test_a_tile_of_the_film_is_not_the_film(randomise):
    """What overlapping tiles of the film would give: near, but another film."""
    net = randomise(UNet(UPSAMPLER, temporal=True)).eval()
    x, low = torch.randn(1, 3, 16, 8, 8), torch.randn(1, 3, 16, 8, 8)
    conditions = {"noise_level": torch.zeros(1), "fps": torch.full((1,), 30.0)}
    t = torch.full((1,), 300)
    whole = net(x, t, low_res=low, **conditions)
    part = net(x[:, :, :10], t, low_res=low[:, :, :10], **conditions)
    assert (part - whole[:, :, :10])[:, :, :6].abs().max() > 1e-4


def test_attention_over_time_sees_all_frames(randomise):
    net = randomise(UNet(ATTENTIVE, temporal=True)).eval()
    x, t = torch.randn(1, 3, 11, 8, 8), torch.full((1,), 300)
    conditions = {"embedding": torch.randn(1, 16), "fps": torch.full((1,), 6.0)}
    torch.testing.assert_close(net(x, t, **conditions, tile=2), net(x, t, **conditions), atol=1e-5, rtol=1e-5)


def test_a_clip_of_few_frames_is_one_tile():
    calls = []
    in_tiles(lambda x, n: calls.append(n) or x, (torch.zeros(9, 2),), 9, tile=5, reach=2)
    in_tiles(lambda x, n: calls.append(n) or x, (torch.zeros(10, 2),), 10, tile=5, reach=2)
    assert calls == [9, 7, 7]
