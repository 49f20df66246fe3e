"""C3D: parameters, shapes by layer, preprocessing, Chainer's keys."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.c3d import C3D, CUBE, convert_keys, prepare, random_c3d


@pytest.fixture(scope="module")
def net():
    return random_c3d()


def test_counts(net):
    assert sum(p.numel() for p in net.parameters()) == 78_409_573
    assert len(net.state_dict()) == 22
    assert not net.training


def test_the_shapes_of_the_layer_table():
    with torch.device("meta"):
        net = C3D()
    expected = {
        "conv1a": (64, 16, 112, 112),
        "conv2a": (128, 16, 56, 56),
        "conv3a": (256, 8, 28, 28),
        "conv3b": (256, 8, 28, 28),
        "conv4a": (512, 4, 14, 14),
        "conv4b": (512, 4, 14, 14),
        "conv5a": (512, 2, 7, 7),
        "conv5b": (512, 2, 7, 7),
        "fc6": (4096,),
        "fc7": (4096,),
        "fc8": (101,),
    }
    seen = {}
    for name, module in net.named_children():
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: tuple(out.shape[1:])}))
    assert net(torch.zeros(2, 3, 16, 112, 112, device="meta")).shape == (2, 101)
    assert seen == expected and list(seen) == list(expected)
    assert net.fc6.in_features == 512 * 1 * 4 * 4  # the last pool makes 4 of 7


def test_the_network_by_hand(net):
    """Written out for a clip, with the layers' own weights."""
    x = torch.randn(1, 3, 16, 112, 112, generator=torch.Generator().manual_seed(0)) * 50
    with torch.no_grad():
        h = x
        for names, kernel in (
            (["conv1a"], (1, 2, 2)),
            (["conv2a"], 2),
            (["conv3a", "conv3b"], 2),
            (["conv4a", "conv4b"], 2),
        ):
            for name in names:
                layer = getattr(net, name)
                h = F.conv3d(h, layer.weight, layer.bias, padding=1).relu()
            h = F.max_pool3d(h, kernel)
        for layer in (net.conv5a, net.conv5b):
            h = F.conv3d(h, layer.weight, layer.bias, padding=1).relu()
        h = F.max_pool3d(F.pad(h, [0, 1, 0, 1]), 2).flatten(1)  # zeros behind, after a ReLU: what ceil mode sees
        for layer in (net.fc6, net.fc7):
            h = layer(h).relu()
        torch.testing.assert_close(net(x), net.fc8(h), rtol=1e-4, atol=1e-5)


def test_preparation():
    videos = torch.randint(0, 256, (2, 3, 16, 30, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean = torch.rand(CUBE, generator=torch.Generator().manual_seed(1)) * 200
    x = prepare(videos, mean)
    assert x.shape == (2, 3, 16, 112, 112)
    frame = 128 * (videos[1, :, 5].float() / 127.5 - 1)
    resized = F.interpolate(frame[None], (112, 112), mode="bilinear", align_corners=True)[0]
    expected = resized[[2, 1, 0]] + 128 - mean[:, 5, 8:120, 8:120]
    torch.testing.assert_close(x[1, :, 5], expected, rtol=1e-5, atol=1e-4)
    corner = frame[[2, 1, 0], 0, 0]  # aligned corners keep the first pixel as it is
    torch.testing.assert_close(prepare(videos)[1, :, 5, 0, 0], corner, rtol=1e-5, atol=1e-4)


def test_chainers_keys(net):
    theirs = {k.replace(".weight", "/W").replace(".bias", "/b"): v for k, v in net.state_dict().items()}
    assert {"conv1a/W", "conv5b/b", "fc8/W"} <= set(theirs)
    ours = convert_keys(theirs)
    assert list(ours) == list(net.state_dict()) and convert_keys(ours) == ours


def test_the_random_network_is_the_seed(net):
    state = torch.get_rng_state()
    first = next(random_c3d(seed=0).parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert first.equal(net.conv1a.weight)
    assert isinstance(net.conv1a, nn.Conv3d) and net.conv1a.bias.abs().sum() == 0


def test_other_shapes_are_refused(net):
    for shape in ((1, 3, 15, 112, 112), (1, 3, 16, 112, 100), (3, 16, 112, 112)):
        with pytest.raises(ValueError, match=r"shape \(b, 3, 16, 112, 112\)"):
            net(torch.zeros(shape))
