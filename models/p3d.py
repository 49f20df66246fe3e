"""Pseudo-3D convolution and attention (Make-A-Video, arXiv 2209.14792, section 3.2, eqs. 2 and 3).

A clip travels through the network with its frames folded into the batch, `(b f) c h w`, in channels-last
memory. Memory order is then b f h w c, and every swap of space and time that the paper writes as a transpose
is a view: nothing is copied.

Both layers begin as the identity in time, so a network inflated from an image model gives each frame exactly
what the image model gave it.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from models.norm import Norm


def frames_to_length(x: Tensor, frames: int) -> Tensor:
    """View `(b f) c h w` (channels-last) as `b c f (h w)` (channels-last): time becomes the height."""
    bf, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1)  # bf h w c: contiguous, for x is channels-last
    if not rows.is_contiguous():
        rows = rows.contiguous()
    return rows.view(bf // frames, frames, h * w, c).permute(0, 3, 1, 2)


def length_to_frames(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse view of `frames_to_length`: `b c f (h w)` to `(b f) c h w`."""
    b, c, f, _ = x.shape
    rows = x.permute(0, 2, 3, 1)
    if not rows.is_contiguous():
        rows = rows.contiguous()
    return rows.view(b * f, height, width, c).permute(0, 3, 1, 2)


class PseudoConv3d(nn.Module):
    """A 2-D convolution of each frame, then a 1-D convolution of each pixel along time (eq. 2).

    The temporal kernel (length 3) is initialised to the dirac delta with zero bias. It pads time on both
    sides, and a clip of one frame skips it. The identity is exact in every precision that does not round what goes
    into a convolution; TF32, cuDNN's default for float32, does (`torch.backends.cudnn.allow_tf32`).

    Shapes: `(b f) c_in h w` -> `(b f) c_out h w`.
    """

    def __init__(self, c_in: int, c_out: int, *, temporal: bool = False):
        super().__init__()
        self.spatial = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.temporal = nn.Conv2d(c_out, c_out, (3, 1), padding=(1, 0)) if temporal else None
        if self.temporal is not None:
            nn.init.dirac_(self.temporal.weight)
            nn.init.zeros_(self.temporal.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, frames: int) -> Tensor:
        return self.along_time(self.spatial(x), frames)

    def along_time(self, x: Tensor, frames: int) -> Tensor:
        """The temporal half alone."""
        if self.temporal is None or frames == 1:
            return x
        y = length_to_frames(self.temporal(frames_to_length(x, frames)), *x.shape[-2:])
        return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()


class TemporalAttention(nn.Module):
    """Attention of each pixel over the frames of its clip, as a residual branch that begins at zero.

    Queries, keys and values are stored `b f (h w) heads d`; attention over f reads them through a transposed
    view. Time enters by a sinusoidal embedding of the frame number, added inside this branch only, so that
    any number of frames is accepted.

    Shapes: `(b f) c h w` -> the same.
    """

    def __init__(self, channels: int, head_width: int):
        super().__init__()
        self.head_width = head_width
        self.norm = Norm(channels, silu=False)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels, bias=False)
        nn.init.zeros_(self.to_out.weight)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        _, c, height, width = x.shape
        rows = frames_to_length(self.norm(x), frames).permute(0, 2, 3, 1)  # b f (h w) c
        position = sinusoidal(torch.arange(frames, device=x.device), c).to(rows.dtype)
        rows = rows + position[None, :, None]

        def heads(y: Tensor) -> Tensor:  # b f (h w) c -> b (h w heads) f d, a view
            return y.view(y.shape[0], frames, -1, self.head_width).transpose(1, 2)

        q, k, v = heads(self.to_q(rows)), heads(self.to_k(rows)), heads(self.to_v(rows))
        out = self.to_out(attend(q, k, v).transpose(1, 2).reshape(rows.shape))
        return x + out.view(-1, height, width, c).permute(0, 3, 1, 2)


class PseudoAttention3d(nn.Module):
    """Spatial attention within each frame, then temporal attention across frames (eq. 3).

    Spatial attention also attends to `context` tokens if there are any (unCLIP's four tokens of the CLIP
    image embedding), whose keys and values join those of the pixels.

    Shapes: x `(b f) c h w`, context `(b f) n d` or None -> as x.
    """

    def __init__(self, channels: int, head_width: int, *, context_width: int = 0, temporal: bool = False):
        super().__init__()
        if channels % head_width:
            raise ValueError(f"attention over {channels} channels cannot have heads of width {head_width}.")
        self.head_width = head_width
        self.norm = Norm(channels, silu=False)
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_context = nn.Linear(context_width, 2 * channels, bias=False) if context_width else None
        self.to_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)
        self.temporal = TemporalAttention(channels, head_width) if temporal else None

    def forward(self, x: Tensor, frames: int, context: Tensor | None = None) -> Tensor:
        height, width = x.shape[-2:]
        q, k, v = self.to_qkv(rearrange(self.norm(x), "bf c h w -> bf (h w) c")).chunk(3, dim=-1)
        if self.to_context is not None and context is not None:
            ck, cv = self.to_context(context).chunk(2, dim=-1)
            k, v = torch.cat((k, ck), dim=1), torch.cat((v, cv), dim=1)
        q, k, v = (rearrange(y, "bf n (heads d) -> bf heads n d", d=self.head_width) for y in (q, k, v))
        out = rearrange(attend(q, k, v), "bf heads n d -> bf n (heads d)")
        x = x + rearrange(self.to_out(out), "bf (h w) c -> bf c h w", h=height, w=width)
        if self.temporal is None or frames == 1:
            return x
        return self.temporal(x, frames)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot product attention, `b heads n d`.

    On a CPU in bf16 torch's fused kernel is up to six times slower in backward than two products of matrices, as
    long as their n x n weights stay in cache. These do copy what is not contiguous, as over time.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= 512:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def sinusoidal(values: Tensor, width: int, period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of a vector of numbers (arXiv 1706.03762): `(n,)` -> `(n, width)`, float32."""
    half = width // 2
    rates = torch.exp(-math.log(period) * torch.arange(half, device=values.device, dtype=torch.float32) / half)
    angles = values.float()[:, None] * rates
    embedding = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return F.pad(embedding, (0, 1)) if width % 2 else embedding
