"""Group normalisation, scale and shift, and SiLU as one differentiable function on channels-last memory.

torch's own GroupNorm leaves channels-last memory on a GPU, is slow in backward on a CPU, and its chain with scale,
shift and SiLU keeps three copies of the activations for backward. This one stays in the memory order it was given,
keeps its input alone, and computes the rest again.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Norm(nn.Module):
    """GroupNorm of each frame alone (arXiv 1803.08494), a scale and shift (ADM, arXiv 2105.05233), and SiLU.

    Shapes: x `n c h w`, scale and shift `n c` or None -> as x. The weights are those of `nn.GroupNorm`.
    """

    def __init__(self, channels: int, *, silu: bool = True, eps: float = 1e-5):
        super().__init__()
        self.groups = math.gcd(32, channels)  # 32 as in ADM, fewer where 32 does not divide the channels
        self.silu, self.eps = silu, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        weight, bias = self.weight.expand(len(x), -1), self.bias.expand(len(x), -1)
        if scale is not None and shift is not None:
            factor = 1 + scale.to(torch.promote_types(scale.dtype, torch.float32))  # bf16 has no number just above 1
            weight, bias = weight * factor, bias * factor + shift
        if x.is_contiguous(memory_format=torch.channels_last) and x.dtype != torch.float16:
            return Normalise.apply(x, weight, bias, self.groups, self.eps, self.silu)
        # Torch's own layers in the common layout, and in float16, in which squares overflow.
        x = F.group_norm(x, self.groups, eps=self.eps)
        x = torch.addcmul(bias[..., None, None].to(x.dtype), x, weight[..., None, None].to(x.dtype))
        return F.silu(x) if self.silu else x


class Normalise(torch.autograd.Function):
    """act(weight * (x - mean) / deviation + bias): weight and bias `n c`, mean and deviation of each group.

    Passes over the pixels are in the precision of x, sums and what follows from them in float32. The pixels are first
    brought near zero by a rough mean, so that in bf16 a mean far above the deviation costs no digits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        pixels, n = rows(x), x.shape[2] * x.shape[3]
        some = pixels[:, ::8]  # every eighth line
        rough = wide(over_groups(total(some), groups) / (some.shape[1] * some.shape[2]), x)
        near = pixels - rough
        mean = over_groups(total(near), groups) / n
        square = over_groups(total(near * near), groups) / n
        rate = ((square - mean * mean).clamp(min=0) + eps).rsqrt()
        out = affine(near, rate * weight, bias - mean * rate * weight)
        ctx.save_for_backward(x, weight, bias, rough, mean, rate)
        ctx.groups, ctx.silu = groups, silu
        return images(F.silu(out, inplace=True) if silu else out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, rough, mean, rate = ctx.saved_tensors
        near, n, g = rows(x) - rough, x.shape[2] * x.shape[3], rows(grad.to(x.dtype))
        scale = rate * weight
        if ctx.silu:
            g = torch.ops.aten.silu_backward(g, affine(near, scale, bias - mean * scale))
        grad_bias = total(g)
        grad_weight = rate * (total(g * near) - mean * grad_bias)
        # What normalisation takes out of the gradient: its mean, and its part along the normalised x.
        a = over_groups(weight * grad_bias, ctx.groups) / n
        b = over_groups(weight * grad_weight, ctx.groups) / n
        grad_x = affine(near, -rate * rate * b, rate * (rate * b * mean - a))
        grad_x = torch.addcmul(grad_x, g, wide(scale, g))
        return images(grad_x), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, None, None


def rows(x: Tensor) -> Tensor:
    """View `n c h w` (channels-last) as `n h w c` (contiguous); a gradient in other memory is copied."""
    return x.permute(0, 2, 3, 1).contiguous()


def images(pixels: Tensor) -> Tensor:
    """The inverse view of `rows`."""
    return pixels.permute(0, 3, 1, 2)


def total(pixels: Tensor) -> Tensor:
    """The sum over the pixels of each image, `n h w c` -> `n c`, float32 or more; that of a line is rounded as x is."""
    return pixels.sum(2).sum(1, dtype=torch.promote_types(pixels.dtype, torch.float32))


def wide(values: Tensor, like: Tensor) -> Tensor:
    """`n c` to multiply `n h w c`, in its precision."""
    return values[:, None, None].to(like.dtype)


def affine(pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * x + shift."""
    return torch.addcmul(wide(shift, pixels), pixels, wide(scale, pixels))


def over_groups(values: Tensor, groups: int) -> Tensor:
    """The mean of each group of channels, repeated: `n c` -> `n c`."""
    grouped = values.unflatten(1, (groups, -1))
    return grouped.mean(-1, keepdim=True).expand_as(grouped).flatten(1)
