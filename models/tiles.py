"""A network of many frames, a few frames at a time in each layer, with the same result to rounding.

The frames that one frame of the output depends on are more than a film has (58 on either side in SR_l^t of the page
base), and the norms read a whole frame. So tiles of the film, or of the picture, would have to overlap by all of it to
give what the whole gives. Tiles of each layer need not: a residual block sees two frames on either side, a convolution
one. Between layers the features of all frames are kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def in_tiles(layer: Callable[..., Tensor], inputs: tuple[Tensor, ...], frames: int, tile: int, reach: int) -> Tensor:
    """`layer(*inputs, frames)`, `tile` frames at a time and `reach` more on either side, which are then dropped.

    Shapes: inputs and result `(b f) ...`. Frame i of the result must depend on frames i - reach ... i + reach alone.
    """
    if not tile or frames <= tile + 2 * reach:
        return layer(*inputs, frames)
    clips = [x.unflatten(0, (-1, frames)) for x in inputs]
    whole: Tensor | None = None
    for start in range(0, frames, tile):
        first, end = max(0, start - reach), min(frames, start + tile + reach)
        part = layer(*(folded(clip[:, first:end]) for clip in clips), end - first)
        if whole is None:
            order = torch.channels_last if channels_last(part) else torch.contiguous_format
            shape = (len(clips[0]) * frames, *part.shape[1:])
            whole = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=order)
        kept = part.unflatten(0, (-1, end - first))[:, start - first : start - first + tile]
        whole.unflatten(0, (-1, frames))[:, start : start + tile] = kept
    assert whole is not None
    return whole


def through(level: Any, inputs: tuple[Tensor, ...], time: Tensor, frames: int, context: Any, tile: int) -> Tensor:
    """A level of the U-Net on its input, and the skip that joins it, in tiles of frames.

    Attention over time reads all frames at each pixel, so a level that has it is run whole.
    """
    if reads_all_frames(level):
        tile = 0
    n = len(inputs)

    def run(*parts: Any) -> Tensor:
        *tensors, count = parts
        x = torch.cat(tensors[:n], dim=1) if n > 1 else tensors[0]
        return level(x, tensors[n], count, tensors[n + 1] if context is not None else None)

    more = (time,) if context is None else (time, context)
    return in_tiles(run, (*inputs, *more), frames, tile, reach=2)


def reads_all_frames(level: Any) -> bool:
    """Has a level attention over time?"""
    attention = getattr(level, "attention", None)
    return getattr(attention, "temporal", None) is not None


def tileable(net: nn.Module) -> bool:
    """Does every level of a network run in tiles?"""
    return not any(reads_all_frames(level) for level in net.modules())


def folded(clip: Tensor) -> Tensor:
    """`b f ...` to `(b f) ...` in the memory order of its frames; a view of one clip, a copy of several."""
    rows = clip.flatten(0, 1)
    return rows.contiguous(memory_format=torch.channels_last) if channels_last(clip[:, 0]) else rows


def channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.stride(1) == 1 and not x.is_contiguous()
