"""Norm against torch's own chain of layers: the same function, nearer to float64, on half the memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.norm import Norm

N, C, H, W = 3, 64, 8, 6


def inputs(dtype=torch.float32, offset=1.0, layout=torch.channels_last):
    x = (torch.randn(N, C, H, W) + offset * torch.randn(N, C, 1, 1)).to(dtype).contiguous(memory_format=layout)
    return x, torch.randn(N, C).to(dtype), torch.randn(N, C).to(dtype)


def torchs(norm, x, scale, shift):
    """The chain that Norm replaces."""
    y = F.group_norm(x, norm.groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    if scale is not None:
        y = torch.addcmul(shift[..., None, None], y, 1 + scale[..., None, None])
    return F.silu(y) if norm.silu else y


def results(function, norm, x, scale, shift, grad):
    """Output and gradients, float64."""
    leaves = [y.detach().clone(memory_format=torch.preserve_format).requires_grad_() for y in (x, scale, shift)]
    norm.zero_grad()
    out = function(*leaves)
    out.backward(grad.to(out.dtype))
    return [y.double() for y in (out.detach(), *(leaf.grad for leaf in leaves), norm.weight.grad, norm.bias.grad)]


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_no_further_from_float64_than_torchs_own(dtype, silu, randomise):
    norm = randomise(Norm(C, silu=silu))
    given, grad = inputs(dtype), torch.randn(N, C, H, W).contiguous(memory_format=torch.channels_last)
    truth = results(lambda *x: torchs(norm, *x), norm, *(x.double() for x in given), grad)
    own = results(norm, norm, *given, grad)
    theirs = results(lambda *x: torchs(norm, *x), norm, *given, grad)
    limit = {torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]
    for a, b, exact in zip(own, theirs, truth, strict=True):
        assert distance(a, exact) < max(limit, 1.1 * distance(b, exact))


@pytest.mark.parametrize("silu", [True, False])
def test_gradients(silu, randomise):
    norm = randomise(Norm(4, silu=silu)).double()
    norm.groups = 2
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    scale, shift = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, a, b, w, c: norm(x, a, b), (x, scale, shift, norm.weight, norm.bias))


def test_without_scale_and_shift_it_is_group_norm(randomise):
    norm, theirs = randomise(Norm(C, silu=False)), nn.GroupNorm(32, C)
    theirs.load_state_dict(norm.state_dict())
    x = inputs()[0]
    torch.testing.assert_close(norm(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_memory_order_is_kept_forth_and_back(layout, randomise):
    norm = randomise(Norm(C))
    x, scale, shift = inputs(layout=layout)
    x.requires_grad_()
    out = norm(x, scale, shift)
    assert out.is_contiguous(memory_format=layout)
    torch.testing.assert_close(out, torchs(norm, x, scale, shift), atol=1e-5, rtol=1e-5)
    out.backward(torch.ones_like(out))
    assert x.grad.is_contiguous(memory_format=layout)


def test_it_keeps_its_input_alone_for_backward(randomise):
    norm = randomise(Norm(C))
    x, scale, shift = inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        norm(x.requires_grad_(), scale, shift)
    large = {y.data_ptr() for y in kept if y.numel() == x.numel()}
    assert large == {x.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean, deviation", [(30.0, 1.0), (-100.0, 1.0), (0.0, 300.0)])
def test_neither_a_large_mean_nor_a_large_deviation_costs_digits(dtype, mean, deviation, randomise):
    norm = randomise(Norm(C, silu=False))
    x = torch.randn(N, C, 64, 32) * deviation + mean
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    truth = torchs(norm, x.double(), None, None)
    limit = 3 * distance(torchs(norm, x, None, None).double(), truth)
    assert distance(norm(x).double(), truth) < max(limit, 1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_a_small_scale_is_heard_in_bf16(randomise):
    norm = Norm(C, silu=False)
    x, _, shift = inputs()
    with torch.no_grad():
        torch.testing.assert_close(
            norm(x, torch.full((N, C), 1e-3).bfloat16(), shift.bfloat16()) - shift.bfloat16()[..., None, None],
            norm(x) * 1.001, atol=1e-5, rtol=1e-4,
        )  # fmt: skip


def test_a_flat_picture_is_finite(randomise):
    norm = randomise(Norm(C))
    x = torch.full((N, C, H, W), 7.0).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = norm(x)
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("channels, groups", [(64, 32), (48, 16), (6, 2)])
def test_groups(channels, groups):
    assert Norm(channels).groups == groups
