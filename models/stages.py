"""What the cascade is made of: a stage, its denoisers and its noise, a film, and the windows of interpolation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.diffusion import Diffusion, split_variance
from models.samplers import Denoise
from models.sampling import STAGES

OnStep = Callable[[str, int, int], None]
"""Called after each step of a sampler with (stage, steps made, steps in all). What it raises ends the film."""

Denoisers = Callable[[Sequence[bool]], Denoise]
"""denoisers(drops): the denoiser of a batch, once for each flag, without its condition where the flag is set."""

STOPS = ("embedding", "decoded", "interpolated", "low", "high")


@dataclass
class Stage:
    """A trained network, the process it inverts, and the side in pixels of what it makes (0 for the prior)."""

    net: nn.Module
    diffusion: Diffusion
    size: int = 0


@dataclass
class Film:
    """What each arrow made, None where it was not asked for; clips are `b 3 f h w` in [-1, 1]."""

    embedding: Tensor
    decoded: Tensor | None = None
    interpolated: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    fps: float = 0.0  # of `interpolated` and what follows
    decoded_fps: float = 0.0

    def clips(self) -> dict[str, Tensor]:
        """What there is of decoded, interpolated, low and high, in this order."""
        made = {name: getattr(self, name) for name in STOPS[1:]}
        return {name: clip for name, clip in made.items() if clip is not None}

    def last(self) -> tuple[Tensor, float]:
        """The clip of the last stage that ran, and its frame rate. Raises ValueError where there is none."""
        if not (clips := self.clips()):
            raise ValueError("this film ends with its embedding: there is no clip.")
        name, clip = list(clips.items())[-1]
        return clip, self.decoded_fps if name == "decoded" else self.fps


def at_once_pays(device: torch.device) -> bool:
    """Is one network call of both halves of guidance faster than two? A CPU is full with one."""
    return device.type != "cpu"


def again(values: Any, times: Sequence[Any]) -> Any:
    """A batch once for each of `times`, one after the other; None stays None."""
    return values if values is None or len(times) == 1 else torch.cat([values] * len(times))


def check_seeds(seeds: Sequence[int], n: int) -> None:
    """Raises ValueError where there is not a seed for each sample, or one is negative."""
    if len(seeds) != n:
        raise ValueError(f"{n} samples need as many seeds, not {len(seeds)}.")
    if any(not 0 <= seed < 2**48 for seed in seeds):
        raise ValueError(f"seeds are whole numbers from 0 to 2^48 - 1, not {', '.join(map(str, seeds))}.")


def check_stop(stop: str, stops: Sequence[str] = STOPS[1:]) -> None:
    """Raises ValueError for a stage that one cannot stop after."""
    if stop not in stops:
        raise ValueError(f"there is no stage '{stop}' to stop after: it is one of {', '.join(stops)}.")


def stream(seed: int, name: str, index: int = 0) -> int:
    """The seed of one stage's noise, so that no two stages of a film share theirs."""
    return (seed * len(STAGES) + STAGES.index(name)) * 1009 + index


def pixel_denoiser(net: nn.Module, diffusion: Diffusion, **conditions: Any) -> Denoise:
    """The denoiser of a pixel network under fixed conditions. Its x0 is not clipped: guidance comes first."""

    def denoise(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        prediction, fraction = split_variance(net(z, t, **conditions).float(), z.shape[1])
        return diffusion.to_x0(prediction, z, t), fraction

    return denoise


def windows(frames: int, length: int, skip: int, together: int) -> list[list[tuple[int, int]]]:
    """How a film is cut into windows (first, end) that share their end keyframes, in groups that are sampled together.

    A window has at most `length` frames, but two keyframes at least; 0 = all frames are one. What remains of a film is
    a shorter window, which is a group of its own.
    """
    span = max((length - 1) // skip * skip, skip) if length else frames - 1
    cuts = [*range(0, max(frames - 1, 1), max(span, 1)), frames - 1]
    spans = [(first, last + 1) for first, last in zip(cuts, cuts[1:], strict=False)]
    full = [each for each in spans if each[1] - each[0] == spans[0][1] - spans[0][0]]
    rest = spans[len(full) :]
    return [full[i : i + together] for i in range(0, len(full), together)] + ([rest] if rest else [])
