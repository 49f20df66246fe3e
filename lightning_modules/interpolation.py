"""Training of upF, masked frame interpolation, from D^t on unlabeled clips (paper, section 3.3)."""

import torch
from torch import Tensor

from lightning_modules.decoder import DecoderModule
from lightning_modules.draws import Draws


class InterpolationModule(DecoderModule):
    """D^t with four more input channels: the given frames, zero where missing, and their mask (1 = given)."""

    def given(self, x0: Tensor, draws: Draws) -> dict[str, Tensor]:
        if x0.ndim == 4:  # of a picture, in joint training, nothing is given
            return {}
        masks = torch.cat([random_masks(1, x0.shape[2], generator) for generator in draws.generators])
        mask = masks.to(x0.device)[:, None, :, None, None]
        return {"given": torch.cat((x0 * mask, mask.expand(-1, 1, -1, *x0.shape[3:])), dim=1)}


def random_masks(n: int, frames: int, generator: torch.Generator | None = None) -> Tensor:
    """Which frames of each clip are given, float `n f`.

    Three of four clips keep every k-th frame, for k a divisor of f - 1, as at inference; the rest a head, a
    tail, both ends or nothing, so that extrapolation and animation are in distribution too.
    """
    skips = [k for k in range(2, frames) if (frames - 1) % k == 0] or [1]
    masks = torch.zeros(n, frames)
    for mask in masks:
        if torch.rand((), generator=generator) < 0.75:
            mask[:: skips[int(torch.randint(len(skips), (), generator=generator))]] = 1
            continue
        length = int(torch.randint(1, max(2, frames // 2), (), generator=generator))
        kind = int(torch.randint(4, (), generator=generator))
        if kind == 0:
            mask[:length] = 1
        elif kind == 1:
            mask[-length:] = 1
        elif kind == 2:
            mask[0] = mask[-1] = 1
    return masks
