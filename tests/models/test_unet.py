"""The whole U-Net, every option on: exactly the image network at init, and what moves it away from there."""

import shutil
from dataclasses import replace
from math import prod

import pytest
import torch
from einops import rearrange
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from models.norm import Norm
from models.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    width=16,
    multiples=[1, 2],
    blocks=1,
    attention=[1, 2],
    head_width=8,
    dropout=0.3,
    embedding_width=12,
    context_tokens=2,
    low_res=True,
    learned_variance=True,
)
B, FRAMES, SIDE = 2, 3, 8


@pytest.fixture
def net(randomise):
    """Temporal layers as they begin, all else as if trained."""
    net = UNet(CONFIG, temporal=True, masked=True)
    return randomise(net, but=net.temporal_keys()).eval()


@pytest.fixture
def inputs():
    return dict(
        x=torch.randn(B, 3, FRAMES, SIDE, SIDE),
        t=torch.tensor([3, 700]),
        embedding=torch.randn(B, 12),
        drop=torch.tensor([False, True]),
        fps=torch.tensor([4.0, 23.976]),
        low_res=torch.randn(B, 3, FRAMES, SIDE, SIDE),
        noise_level=torch.tensor([0, 120]),
        given=torch.randn(B, 4, FRAMES, SIDE, SIDE),
    )


def folded(inputs):
    """Each frame a sample of its own."""
    return {
        k: rearrange(v, "b c f h w -> (b f) c 1 h w") if v.ndim == 5 else v.repeat_interleave(FRAMES, 0)
        for k, v in inputs.items()
    }


def cast(inputs, dtype):
    return {k: v.to(dtype) if v.is_floating_point() and k != "fps" else v for k, v in inputs.items()}


def clip_and_frames(net, inputs, how="float32"):
    """The network on the clip, and on its frames as images."""
    if how == "bfloat16":
        net, inputs = net.bfloat16(), cast(inputs, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        clip, frames = net(**inputs), net(**folded(inputs))
    assert clip.isfinite().all() and clip.float().std() > 0.1
    return clip, rearrange(frames, "(b f) c 1 h w -> b c f h w", f=FRAMES)


SWITCHES = {
    "as it is": {},
    "no temporal attention": {"temporal_attention": False},
    "no context tokens": {"context_tokens": 0},
    "no embedding": {"embedding_width": 0},
    "no attention": {"attention": []},
    "no small clip": {"low_res": False},
    "variance not learned": {"learned_variance": False},
    "residual": {"residual": True},
    "patches": {"patch": 2, "residual": True},
    "recomputed": {"checkpoint_activations": True},
    "common layout": {"channels_last": False},
    "one level": {"multiples": [1], "attention": [1]},
}


@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("switch", SWITCHES)
@torch.no_grad()
def test_a_clip_is_its_frames(inputs, randomise, switch, how):
    config = replace(CONFIG, **SWITCHES[switch])
    net = UNet(config, temporal=True, masked=True)
    randomise(net, but=net.temporal_keys()).eval()
    if not config.low_res:
        del inputs["low_res"], inputs["noise_level"]
    assert torch.equal(*clip_and_frames(net, inputs, how))


def test_a_clip_is_its_frames_in_training_too(net, inputs):
    """With gradients and recomputation; dropout off, which draws for each network anew."""
    net.train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "recompute"):
            module.recompute = True
    assert torch.equal(*clip_and_frames(net, inputs))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("how", ["float32", "autocast"])
@torch.no_grad()
def test_compiled_a_clip_is_its_frames_within_one_rounding(inputs, randomise, how):
    net = UNet(replace(CONFIG, multiples=[1], attention=[1]), temporal=True, masked=True)
    randomise(net, but=net.temporal_keys()).eval()
    keys, (expected, _) = list(net.state_dict()), clip_and_frames(net, inputs, how)
    # A rounding in one layer is a rounding of the input of the next: what moving the input by one does to the output.
    dtype = torch.float32 if how == "float32" else torch.bfloat16
    x = inputs["x"].to(dtype)
    moved, _ = clip_and_frames(net, {**inputs, "x": x.nextafter(torch.tensor(torch.inf, dtype=dtype)).float()}, how)
    expected_of_x, _ = clip_and_frames(net, {**inputs, "x": x.float()}, how)
    rounding = (moved - expected_of_x).abs().max()
    assert 0 < rounding < {torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    net.compile(fullgraph=True)  # in place; one graph, or an error
    counters.clear()
    clip, frames = clip_and_frames(net, inputs, how)
    assert list(net.state_dict()) == keys and counters["stats"]["unique_graphs"] >= 2
    assert (clip - frames).abs().max() <= rounding
    assert (clip - expected).abs().max() <= rounding * (1 if how == "float32" else 2)  # fewer roundings than eager


def test_compiled_gradients_are_the_gradients(inputs, randomise):
    """Traced forth and back as one graph; by which compiler does not matter here, and C++ takes minutes."""
    net = UNet(replace(CONFIG, multiples=[1], attention=[1], dropout=0.0), temporal=True, masked=True)
    randomise(net)
    grads = []
    for compiled in (False, True):
        if compiled:
            net.compile(fullgraph=True, backend="aot_eager")
        net.zero_grad()
        net(**inputs).square().mean().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_time_costs_no_copies(inputs, randomise, masked):
    """Every copy of one forward pass, counted by the profiler: a clip has no more of them than its frames.

    In bf16 on a CPU temporal attention does copy: `attend` says why. Its convolutions do not: below.
    """

    def copies(net, inputs):
        net(**inputs)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            net(**inputs)
        activations = (event for event in recorded.events() if event.input_shapes and event.input_shapes[0])
        return sum(event.name == "aten::copy_" and prod(event.input_shapes[0]) >= 1000 for event in activations)

    if not masked:
        del inputs["given"]
    video = randomise(UNet(CONFIG, temporal=True, masked=masked)).eval()
    image = randomise(UNet(CONFIG)).eval()
    still = {k: v for k, v in folded(inputs).items() if k not in ("given", "fps")}
    # a clip is folded into the batch once, before the first layer; so are the masked frames of upF
    assert copies(video, inputs) == copies(image, still) + masked
    common = UNet(replace(CONFIG, channels_last=False), temporal=True, masked=masked)  # this test can fail
    assert copies(randomise(common).eval(), inputs) > copies(video, inputs) + 20


@torch.no_grad()
def test_convolutions_over_time_cost_no_copies_in_bf16_either(inputs, randomise):
    def copies(temporal):
        net = randomise(UNet(replace(CONFIG, attention=[]), temporal=temporal)).eval().bfloat16()
        given = cast(inputs if temporal else folded(inputs), torch.bfloat16)
        del given["given"]
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            net(**given)
        return sum(e.name == "aten::copy_" and prod(e.input_shapes[0]) >= 1000 for e in recorded.events())

    assert copies(True) == copies(False)


def test_activations_stay_channels_last(net, inputs):
    seen = []
    for module in net.modules():
        if isinstance(module, (torch.nn.Conv2d, Norm)):
            module.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    net(**inputs)
    assert len(seen) > 40
    for tensors in seen:
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in tensors)


@torch.no_grad()
def test_without_attention_any_size_will_do(randomise):
    net = randomise(UNet(replace(CONFIG, attention=[], embedding_width=0))).eval()
    big = torch.randn(1, 6, 40, 64)
    level = torch.tensor([20])
    for height, width in ((40, 64), (24, 10)):
        x, low = big[:, :3, :height, :width], big[:, 3:, :height, :width]
        assert net(x, torch.tensor([3]), low_res=low, noise_level=level).shape == (1, 6, height, width)


@torch.no_grad()
def test_frames_meet_once_temporal_weights_have_moved(net, inputs, randomise):
    randomise(net)
    other = dict(inputs, x=inputs["x"].clone())
    other["x"][:, :, 0] += 1
    assert ((net(**inputs) - net(**other)).abs().amax(dim=(0, 1, 3, 4)) > 1e-3).all()


@torch.no_grad()
def test_an_image_is_a_clip_of_one_frame_and_sees_no_temporal_weight(net, inputs, randomise):
    image = UNet(CONFIG).eval()
    image.load_state_dict({k: v for k, v in net.state_dict().items() if k not in net.temporal_keys()})
    randomise(net, but=set(net.state_dict()) - net.temporal_keys())
    del inputs["given"]
    still = {k: v[:, :, :1] if v.ndim == 5 else v for k, v in inputs.items()}
    flat = {k: v.squeeze(2) if v.ndim == 5 else v for k, v in still.items()}
    expected = image(**flat)
    assert expected.shape == (B, 6, SIDE, SIDE)
    assert torch.equal(net(**flat), expected)
    assert torch.equal(net(**still).squeeze(2), expected)


@pytest.mark.parametrize("condition", ["fps", "given"])
@torch.no_grad()
def test_conditions_of_video_do_nothing_at_first(net, inputs, randomise, condition):
    changed = {**inputs, condition: inputs[condition] + 5}
    without = {k: v for k, v in inputs.items() if k != condition}
    assert torch.equal(net(**inputs), net(**changed)) and torch.equal(net(**inputs), net(**without))
    randomise(net)
    assert not torch.allclose(net(**inputs), net(**changed), atol=1e-3)


@pytest.mark.parametrize("condition", ["t", "embedding", "low_res", "noise_level"])
@torch.no_grad()
def test_every_other_condition_is_heard(net, inputs, condition):
    changed = {**inputs, condition: inputs[condition] + 5}
    assert (net(**inputs) - net(**changed))[0].abs().max() > 1e-2


@torch.no_grad()
def test_drop_replaces_the_embedding(net, inputs):
    other = dict(inputs, embedding=torch.randn(B, 12))
    a, b = net(**inputs), net(**other)
    assert not torch.allclose(a[0], b[0], atol=1e-3) and torch.equal(a[1], b[1])
    everywhere = torch.ones(B, dtype=torch.bool)
    assert torch.equal(net(**{**inputs, "drop": everywhere}), net(**{**other, "drop": everywhere}))
    none = net.no_embedding.expand(B, -1)
    assert torch.equal(net(**{**inputs, "drop": everywhere}), net(**{**inputs, "embedding": none, "drop": None}))


def test_an_image_checkpoint_loads_into_the_video_network(randomise):
    image = randomise(UNet(CONFIG))
    video, masked = UNet(CONFIG, temporal=True), UNet(CONFIG, temporal=True, masked=True)
    missing = set(video.state_dict()) - set(image.state_dict())
    assert missing == video.temporal_keys() and not set(image.state_dict()) - set(video.state_dict())
    parts = {"fps.", "conv_in.temporal.", "middle.0.attention.temporal.to_q.", "conv_out.temporal."}
    assert all(any(k.startswith(part) for k in missing) for part in parts)
    before = {k: v.clone() for k, v in video.state_dict().items()}
    video.load_image_weights(image.state_dict())
    for key, value in video.state_dict().items():
        assert torch.equal(value, before[key] if key in missing else image.state_dict()[key]), key
    randomise(video)
    assert set(masked.state_dict()) - set(video.state_dict()) == {"conv_given.weight"}
    masked.load_image_weights(video.state_dict())
    for key, value in video.state_dict().items():
        assert torch.equal(masked.state_dict()[key], value), key
    assert not masked.conv_given.weight.any()


def test_an_image_network_has_no_temporal_keys():
    assert UNet(CONFIG).temporal_keys() == set()


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_a_checkpoint_of_another_network_is_named(damage):
    state, video = UNet(CONFIG).state_dict(), UNet(CONFIG, temporal=True)
    before = {k: v.clone() for k, v in video.state_dict().items()}
    key = {"missing": "middle.0.res.conv_in.spatial.weight", "unexpected": "foreign.weight", "shape": "time.0.bias"}
    if damage == "missing":
        del state[key[damage]]
    else:
        state[key[damage]] = torch.zeros(7)
    with pytest.raises(ValueError, match=key[damage]):
        video.load_image_weights(state)
    assert all(torch.equal(v, before[k]) for k, v in video.state_dict().items())


def test_a_smaller_network_is_refused():
    small = UNet(replace(CONFIG, width=8))
    with pytest.raises(ValueError, match="conv_in.spatial"):
        UNet(CONFIG, temporal=True).load_image_weights({k: v for k, v in small.state_dict().items() if "conv_in" in k})


def test_gradients_at_step_one(net, inputs):
    net(**inputs).square().sum().backward()
    zero, moved = set(), set()
    for key, p in net.named_parameters():
        assert p.grad is not None, key
        (moved if p.grad.any() else zero).add(key)
    temporal = net.temporal_keys()
    silent = {k for k in temporal if ".attention.temporal." in k and ".to_out." not in k}
    assert {k.split(".")[-2] for k in silent} == {"norm", "to_q", "to_k", "to_v"}
    silent |= {"fps.0.weight", "fps.0.bias"}
    assert zero & temporal == silent
    assert {k for k in temporal - silent if "to_out" in k or "conv" in k} <= moved
    assert {"fps.2.weight", "fps.2.bias", "conv_given.weight"} <= moved


def test_recomputed_activations_change_nothing(net, inputs):
    net.train()
    results = []
    for recompute in (False, True):
        for module in net.modules():
            if hasattr(module, "recompute"):
                module.recompute = recompute
        net.zero_grad()
        torch.manual_seed(5)  # dropout is the same in the second forward pass of a block
        output = net(**inputs)
        output.square().sum().backward()
        results.append((output.detach(), [p.grad.clone() for p in net.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_checkpoint_activations_recomputes(inputs, monkeypatch):
    calls = []
    monkeypatch.setattr("models.unet.checkpoint", lambda f, *a, **k: calls.append(1) or f(*a))
    for on in (False, True):
        net = UNet(replace(CONFIG, checkpoint_activations=on), temporal=True)
        net(**inputs)
        assert len(calls) == on * (len(net.down) + len(net.middle) + len(net.up))


@torch.no_grad()
def test_any_number_of_frames(net, inputs, randomise):
    randomise(net)
    long = {k: torch.cat((v, v, v), 2) if v.ndim == 5 else v for k, v in inputs.items()}
    assert net(**long).shape == (B, 6, 3 * FRAMES, SIDE, SIDE)


def test_wrong_input_is_refused(net, inputs):
    for shape in ((1, 3, 2, 9, 8), (1, 3, 8, 9)):
        with pytest.raises(ValueError, match="divisible by 2"):
            net(torch.zeros(shape), torch.zeros(1))
    with pytest.raises(ValueError, match="embedding"):
        net(inputs["x"], inputs["t"])


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("patch", [1, 2])
def test_a_residual_upsampler_begins_as_the_small_clip(inputs, frames, patch):
    """unet.residual: the network of step 0 is the plain resize of what it is given, whatever the noise."""
    shape = replace(CONFIG, residual=True, learned_variance=False, embedding_width=0, patch=patch)
    fresh = UNet(shape, temporal=True)
    x, low = torch.randn(2, 3, frames, 8, 8), torch.randn(2, 3, frames, 8, 8)
    out = fresh(x, torch.tensor([3, 900]), low_res=low, noise_level=torch.tensor([0, 40]))
    assert torch.equal(out, low)


@torch.no_grad()
def test_patches_are_pixels_in_channels(randomise):
    """unet.patch: the network is a plain one on pixel_unshuffle's channels, and its output goes the way back."""
    plain = replace(CONFIG, low_res=False, embedding_width=0, attention=[])
    net = randomise(UNet(replace(plain, patch=2))).eval()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    inner = randomise(UNet(plain)).eval()
    inner.conv_in, inner.conv_out = net.conv_in, net.conv_out
    inner.load_state_dict(net.state_dict())
    want = torch.nn.functional.pixel_shuffle(inner(torch.nn.functional.pixel_unshuffle(x, 2), t), 2)
    torch.testing.assert_close(net(x, t), want)
