"""The pseudo-3D layers: the identity at init, and the paper's einops once their weights have moved."""

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from models.p3d import (
    PseudoAttention3d,
    PseudoConv3d,
    TemporalAttention,
    attend,
    frames_to_length,
    length_to_frames,
    sinusoidal,
)

B, C, FRAMES, H, W = 2, 16, 5, 4, 6


def rows(dtype=torch.float32, c=C, frames=FRAMES, h=H, w=W):
    x = torch.randn(B * frames, c, h, w, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_temporal_convolution_begins_as_the_identity(dtype):
    conv = PseudoConv3d(C, C, temporal=True).to(dtype).to(memory_format=torch.channels_last)
    x = rows(dtype)
    assert torch.equal(conv.along_time(x, FRAMES), x)
    assert torch.equal(conv(x, FRAMES), conv.spatial(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temporal_attention_begins_as_the_identity(dtype, randomise):
    attention = PseudoAttention3d(C, 8, context_width=12, temporal=True)
    randomise(attention, but={"temporal.to_out.weight"}).to(dtype)
    flat = PseudoAttention3d(C, 8, context_width=12).to(dtype)
    flat.load_state_dict({k: v for k, v in attention.state_dict().items() if not k.startswith("temporal.")})
    x, context = rows(dtype), torch.randn(B * FRAMES, 3, 12).to(dtype)
    assert torch.equal(attention.temporal(x, FRAMES), x)
    assert torch.equal(attention(x, FRAMES, context), flat(x, FRAMES, context))
    assert not torch.allclose(flat(x, FRAMES, context), flat(x, FRAMES, context + 1))


def test_one_frame_skips_time(randomise):
    conv, attention = PseudoConv3d(C, C, temporal=True), PseudoAttention3d(C, 8, temporal=True)
    for layer in (conv, attention):
        randomise(layer)
    x = rows()
    assert torch.equal(conv(x, 1), conv.spatial(x))
    assert not torch.allclose(conv(x, FRAMES), conv.spatial(x), atol=0.1)
    one, many = attention(x, 1), attention(x, FRAMES)
    attention.temporal = None
    assert torch.equal(one, attention(x, FRAMES))
    assert not torch.allclose(one, many, atol=0.1)


def test_the_convolution_is_the_papers(randomise):
    conv = randomise(PseudoConv3d(C, 24, temporal=True))
    x = rows()
    y = rearrange(conv.spatial(x), "(b f) c h w -> (b h w) c f", f=FRAMES)
    y = F.conv1d(y, conv.temporal.weight.squeeze(-1), conv.temporal.bias, padding=1)
    y = rearrange(y, "(b h w) c f -> (b f) c h w", h=H, w=W)
    torch.testing.assert_close(conv(x, FRAMES), y, atol=1e-5, rtol=1e-5)


def test_the_attention_is_the_papers(randomise):
    layer, width = randomise(TemporalAttention(C, 8)), 8
    x = rows()
    y = rearrange(layer.norm(x), "(b f) c h w -> (b h w) f c", f=FRAMES)
    y = y + sinusoidal(torch.arange(FRAMES), C)
    q, k, v = (rearrange(to(y), "n f (k d) -> n k f d", d=width) for to in (layer.to_q, layer.to_k, layer.to_v))
    weights = torch.einsum("n k i d, n k j d -> n k i j", q, k).div(width**0.5).softmax(-1)
    y = layer.to_out(rearrange(weights @ v, "n k f d -> n f (k d)"))
    y = x + rearrange(y, "(b h w) f c -> (b f) c h w", h=H, w=W)
    torch.testing.assert_close(layer(x, FRAMES), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer, reach", [("conv", slice(1, 4)), ("attention", slice(None))])
@torch.no_grad()
def test_clips_of_a_batch_and_pixels_do_not_mix(randomise, layer, reach):
    conv, attention = randomise(PseudoConv3d(C, C, temporal=True)), randomise(TemporalAttention(C, 8))
    attention.norm = torch.nn.Identity()  # its statistics are of the whole frame
    along_time = conv.along_time if layer == "conv" else attention
    x = rows()
    moved = x.clone()
    moved[FRAMES + 2, :, 1, 3] += 1  # one pixel of one frame of the second clip
    difference = (along_time(moved, FRAMES) - along_time(x, FRAMES)).abs().amax(1).view(B, FRAMES, H, W) > 1e-5
    expected = torch.zeros(B, FRAMES, H, W, dtype=torch.bool)
    expected[1, reach, 1, 3] = True
    assert torch.equal(difference, expected)


def test_gradients_of_both_layers(randomise):
    conv = randomise(PseudoConv3d(2, 4, temporal=True)).double()
    attention = randomise(PseudoAttention3d(4, 2, context_width=3, temporal=True)).double()
    x = rows(torch.float64, c=2, frames=3, h=2, w=2).requires_grad_()
    context = torch.randn(B * 3, 1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *weights: conv(x, 3), (x, *conv.parameters()))
    x = rows(torch.float64, c=4, frames=3, h=2, w=2).requires_grad_()
    everything = (x, context, *attention.parameters())
    assert torch.autograd.gradcheck(lambda x, context, *weights: attention(x, 3, context), everything)


def test_time_is_swapped_without_a_copy():
    x = rows()
    long = frames_to_length(x, FRAMES)
    assert long.data_ptr() == x.data_ptr() and long.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(long, rearrange(x, "(b f) c h w -> b c f (h w)", f=FRAMES))
    back = length_to_frames(long, H, W)
    assert back.data_ptr() == x.data_ptr() and torch.equal(back, x)
    other = rows().contiguous()  # not channels-last: copied, and still right
    assert torch.equal(frames_to_length(other, FRAMES), rearrange(other, "(b f) c h w -> b c f (h w)", f=FRAMES))


@pytest.mark.parametrize("n", [FRAMES, 600])
def test_attention_in_bf16_is_attention(n):
    """On a CPU short sequences take a way of their own."""
    q, k, v = (torch.randn(2, 3, n, 16).bfloat16().requires_grad_() for _ in range(3))
    grad = torch.randn(2, 3, n, 16)
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves) if dtype == torch.bfloat16 else F.scaled_dot_product_attention(*leaves)
        assert out.dtype == dtype
        out.backward(grad.to(dtype))
        grads.append([out.detach().double(), *(x.grad.double() for x in leaves)])
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() / b.norm() < 1e-2


@pytest.mark.parametrize("layer", ["conv", "attention"])
@torch.no_grad()
def test_the_common_memory_layout_gives_the_same_numbers(randomise, layer):
    net = randomise(PseudoConv3d(C, C, temporal=True) if layer == "conv" else PseudoAttention3d(C, 8, temporal=True))
    x = rows()
    out = net(x.contiguous(), FRAMES)
    assert out.is_contiguous()
    torch.testing.assert_close(out, net(x, FRAMES), atol=1e-5, rtol=1e-5)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="16 channels"):
        PseudoAttention3d(16, 5)
