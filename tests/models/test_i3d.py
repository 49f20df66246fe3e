"""I3D: the published shapes and counts, TensorFlow's padding, both key layouts."""

import pytest
import torch
import torch.nn.functional as F

from models.i3d import (
    I3D,
    MIXED,
    MaxPool,
    Mixed,
    convert_keys,
    fold_batch_norm,
    is_hassony2,
    pad_same,
    random_i3d,
    same_padding,
)

TO_HASSONY2 = [
    ("logits.", "conv3d_0c_1x1."),
    ("Conv3d_", "conv3d_"),
    ("Mixed_", "mixed_"),
    (".bn.", ".batch3d."),
    (".b0.", ".branch_0."),
    (".b1a.", ".branch_1.0."),
    (".b1b.", ".branch_1.1."),
    (".b2a.", ".branch_2.0."),
    (".b2b.", ".branch_2.1."),
    (".b3b.", ".branch_3.1."),
]


def to_hassony2(state_dict):
    renamed = {}
    for key, value in state_dict.items():
        for piergiaj, hassony2 in TO_HASSONY2:
            key = key.replace(piergiaj, hassony2)
        renamed[key] = value
    return renamed


@pytest.fixture(scope="module")
def net():
    return random_i3d()


def test_counts(net):
    assert len(net.state_dict()) == 344
    assert sum(p.numel() for p in net.parameters()) == 12_697_264
    assert sum(isinstance(m, torch.nn.BatchNorm3d) for m in net.modules()) == 57
    assert net.state_dict()["logits.conv3d.weight"].shape == (400, 1024, 1, 1, 1)


def test_the_widths_of_the_blocks(net):
    table = {"3b": (192, 256), "3c": (256, 480), "4b": (480, 512), "4c": (512, 512), "4d": (512, 512)}
    table |= {"4e": (512, 528), "4f": (528, 832), "5b": (832, 832), "5c": (832, 1024)}
    assert list(table) == list(MIXED)
    for name, (c_in, c_out) in table.items():
        block = getattr(net, f"Mixed_{name}")
        assert isinstance(block, Mixed)
        assert (block.b0.conv3d.in_channels, block.c_out) == (c_in, c_out)


def test_the_shapes_of_the_layer_table(net):
    expected = {
        "Conv3d_1a_7x7": (64, 8, 112),
        "MaxPool3d_2a_3x3": (64, 8, 56),
        "Conv3d_2c_3x3": (192, 8, 56),
        "MaxPool3d_3a_3x3": (192, 8, 28),
        "Mixed_3c": (480, 8, 28),
        "MaxPool3d_4a_3x3": (480, 4, 14),
        "Mixed_4f": (832, 4, 14),
        "MaxPool3d_5a_2x2": (832, 2, 7),
        "Mixed_5c": (1024, 2, 7),
        "avg_pool": (1024, 1, 1),
    }
    seen = {}

    def note(name):
        return lambda module, args, out: seen.update({name: (out.shape[1], out.shape[2], out.shape[3])})

    hooks = [getattr(net, name).register_forward_hook(note(name)) for name in expected]
    with torch.no_grad():
        out = net(torch.zeros(1, 3, 16, 224, 224))
    for hook in hooks:
        hook.remove()
    assert out.shape == (1, 400)
    assert seen == expected


@pytest.mark.parametrize("frames, steps", [(9, 1), (16, 1), (17, 2), (24, 2), (25, 3), (32, 3)])
def test_time_steps_of_a_clip(frames, steps):
    for kernel, stride in ((7, 2), (3, 2), (2, 2)):  # the layers that stride in time
        front, behind = same_padding(frames, kernel, stride)
        frames = (frames + front + behind - kernel) // stride + 1
    assert frames - 1 == steps  # the last pool, of two


@pytest.mark.parametrize(
    "size, kernel, stride, expected",
    [
        (224, 7, 2, (2, 3)),
        (225, 7, 2, (3, 3)),
        (9, 7, 2, (3, 3)),
        (16, 7, 2, (2, 3)),
        (112, 3, 2, (0, 1)),
        (7, 3, 2, (1, 1)),
        (56, 3, 1, (1, 1)),
        (14, 2, 2, (0, 0)),
        (5, 2, 2, (0, 1)),
        (28, 1, 1, (0, 0)),
        (8, 1, 2, (0, 0)),
    ],
)
def test_same_padding(size, kernel, stride, expected):
    assert same_padding(size, kernel, stride) == expected
    assert (size + sum(expected) - kernel) // stride + 1 == -(-size // stride)


def test_lopsided_padding_goes_behind_in_its_own_axis():
    x, rest = pad_same(torch.ones(1, 1, 5, 8, 7), (3, 3, 3), (2, 2, 2))  # f 1 and 1, h 0 and 1, w 1 and 1
    assert rest == [0, 0, 0] and x.shape == (1, 1, 7, 9, 9)
    assert x[0, 0, 1:6, :8, 1:8].all() and x.sum() == 5 * 8 * 7


@pytest.mark.parametrize(
    "kernel, stride", [((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2)), ((3, 3, 3), (1, 1, 1))]
)
def test_pools_are_those_of_zeros_around(kernel, stride):
    for size in ((5, 8, 7), (8, 7, 14), (4, 9, 6), (3, 3, 5)):
        x = torch.rand(1, 2, *size, generator=torch.Generator().manual_seed(0))
        pads = [same_padding(n, k, s) for n, k, s in zip(size, kernel, stride, strict=True)]
        expected = F.max_pool3d(F.pad(x, [p for pair in reversed(pads) for p in pair]), kernel, stride)
        assert torch.equal(MaxPool(kernel, stride)(x), expected)


def test_a_folded_network_is_the_same_function():
    net = random_i3d(seed=2)
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_(0, 0.1, generator=generator)
    x = torch.rand(1, 3, 9, 224, 224, generator=generator) * 2 - 1
    with torch.no_grad():
        expected = net(x)
        folded = fold_batch_norm(net)(x)
    assert not any(isinstance(module, torch.nn.BatchNorm3d) for module in net.modules())
    assert expected.std() > 0.1
    torch.testing.assert_close(folded, expected, rtol=1e-5, atol=1e-5 * expected.std().item() * 10)


def test_eight_frames_and_other_sizes_are_refused(net):
    for shape in ((1, 3, 8, 224, 224), (1, 3, 9, 224, 200), (1, 1, 9, 224, 224), (3, 9, 224, 224)):
        with pytest.raises(ValueError, match=r"shape \(b, 3, f, 224, 224\)"):
            net(torch.zeros(shape))


def test_eps_reaches_every_norm():
    for eps in (1e-3, 1e-5):
        assert {m.eps for m in I3D(eps=eps).modules() if isinstance(m, torch.nn.BatchNorm3d)} == {eps}


def test_keys_map_both_ways(net):
    ours = net.state_dict()
    theirs = to_hassony2(ours)
    assert is_hassony2(theirs) and not is_hassony2(ours)
    assert {
        "conv3d_1a_7x7.batch3d.running_var",
        "mixed_4c.branch_2.1.conv3d.weight",
        "mixed_5c.branch_0.batch3d.bias",
        "conv3d_0c_1x1.conv3d.bias",
    } <= set(theirs)
    assert not set(theirs) & set(ours)
    for converted in (convert_keys(theirs), convert_keys(ours)):
        assert type(converted) is dict and list(converted) == list(ours)
        assert all(converted[key] is value for key, value in ours.items())


def test_287_keys_load_strictly(net):
    old = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(old) == 287
    other = I3D(eps=1e-5)
    other.load_state_dict(convert_keys(old))
    assert torch.equal(other.Mixed_5c.b3b.conv3d.weight, net.Mixed_5c.b3b.conv3d.weight)


def test_the_random_network_is_the_seed_and_leaves_the_global_generator_alone(net):
    state = torch.get_rng_state()
    again, other = random_i3d(), random_i3d(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), net.parameters(), strict=True))
    assert not torch.equal(other.logits.conv3d.weight, net.logits.conv3d.weight)


def test_the_random_network_passes_its_input_on(net):
    x = torch.rand(2, 3, 9, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x[1] *= 0.5
    with torch.no_grad():
        logits = net(x)
    assert 0.3 < logits.std() < 30
    assert (logits[0] - logits[1]).abs().mean() > 0.1
