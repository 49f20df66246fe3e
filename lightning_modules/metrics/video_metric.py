"""What all measures of videos share: input that is checked, states that gather, and what stands beside a number."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def check_videos(videos: Tensor, frames: int = 1) -> None:
    """Raises ValueError unless `videos` is uint8 (b, 3, f, h, w) with f >= `frames`."""
    if videos.dtype != torch.uint8:
        kind = str(videos.dtype).removeprefix("torch.")
        if videos.is_floating_point() and videos.numel():
            nan = ", some of them NaN" if videos.isnan().any() else ""
            finite = videos[~videos.isnan()]
            span = f" from {finite.min():.3g} to {finite.max():.3g}" if finite.numel() else ""
            kind += f"{span}{nan}"
        raise ValueError(f"Videos must be uint8 in 0..255, not {kind}.")
    if videos.ndim != 5 or videos.shape[1] != 3:
        raise ValueError(f"Videos must have the shape (b, 3, f, h, w), not {tuple(videos.shape)}.")
    if videos.shape[2] < frames:
        raise ValueError(f"The network needs clips of at least {frames} frames, and these have {videos.shape[2]}.")


CLIP_RESIZE = "CLIP's own: short side to its input, bicubic, antialiased, centre crop"


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Feature networks in whole float32: no gradients, no autocast, no TF32, whatever training has set."""
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    kept = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), cudnn.flags(**kept, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def bootstrap(
    value: float, influences: Sequence[Tensor], level: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Bootstrap percentile interval of a statistic by its first-order expansion in the weights of the videos.

    `influences` holds, for each independent set of n videos, the derivative (n,) of the statistic by each video's
    weight. A resample that draws video i w_i times is then worth value + sum_i (w_i - 1) influence_i, a sum instead of
    a new statistic: the infinitesimal jackknife's view of the bootstrap (Jaeckel 1972; Efron, "The Jackknife, the
    Bootstrap and Other Resampling Plans", 1982, chapter 6). The order of the videos does not matter.
    """
    if not 0 < level < 1:
        raise ValueError(f"The level of an interval lies between 0 and 1, and it is {level}.")
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.zeros(resamples, dtype=torch.float64)
    for influence in influences:
        influence = influence.double().cpu().sort().values
        influence = influence - influence.mean()
        n = len(influence)
        for part in shifts.split(max(1, 2**22 // n)):  # views: a few million draws at a time
            part += influence[torch.randint(n, (len(part), n), generator=generator)].sum(1)
    tail = (1 - level) / 2
    low, high = torch.quantile(shifts, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return value + low, value + high


class VideoMetric(Metric):
    """A measure of clips of one or two kinds, "real" and "fake" (generated).

    A subclass says what a clip leaves behind (`add_rows`, or states of its own), `compute`, and `influences`. What it
    leaves is what grows: never frames. Ranks are gathered for `compute`, `interval` and `summary`, which every rank
    must then call.
    """

    is_differentiable = False
    full_state_update = False
    kinds: tuple[str, ...] = ("real", "fake")
    least = -math.inf  # that the value can be: an interval does not go below
    name: str

    def __init__(self) -> None:
        super().__init__()
        self.widths: dict[str, int] = {}
        for kind in self.kinds:
            self.add_state(f"n_{kind}", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
            # (f, h, w) of the clips; a rank that saw none has zeros, hence the maximum
            self.add_state(f"{kind}_shape", default=torch.zeros(3, dtype=torch.long), dist_reduce_fx="max")

    def add_rows(self, name: str, width: int) -> None:
        """A state of float32 rows (n, width), appended to as a list of tensors."""
        self.widths[name] = width
        self.add_state(name, default=[], dist_reduce_fx="cat")

    def rows(self, name: str) -> Tensor:
        """All rows (n, width) so far."""
        state = getattr(self, name)  # a list of tensors, and one tensor where ranks are gathered
        return dim_zero_cat(state) if len(state) else torch.empty(0, self.widths[name], device=self.device)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        for name in self.widths:  # a rank without clips must gather rows too, of the same width as the others'
            if isinstance(getattr(self, name), list):
                setattr(self, name, [self.rows(name)])
        super().sync(*args, **kwargs)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The states of all ranks within, one's own afterwards."""
        if self._is_synced:
            yield
        else:
            with self.sync_context(should_sync=self._to_sync):
                yield

    def note(self, videos: Tensor, kind: str) -> None:
        """Counts clips and holds them to one length, and those of a kind to one size; ValueError where they differ."""
        shape = torch.tensor(videos.shape[2:], device=self.device)
        own, frames = getattr(self, f"{kind}_shape"), self.frames
        if frames and frames != shape[0]:
            raise ValueError(f"All clips have one length; {frames} frames came first, now {shape[0]}.")
        if own.any() and not torch.equal(own, shape):
            first, now = resolution(own), resolution(shape)
            raise ValueError(f"All {kind} clips have one size; {first} came first, now {now}.")
        setattr(self, f"{kind}_shape", shape)
        setattr(self, f"n_{kind}", getattr(self, f"n_{kind}") + len(videos))

    @property
    def frames(self) -> int:
        """Frames of each clip, 0 before the first."""
        return max(int(getattr(self, f"{kind}_shape")[0]) for kind in self.kinds)

    def need(self, least: int = 2) -> None:
        """ValueError unless there are `least` clips of each kind."""
        counts = [int(getattr(self, f"n_{kind}")) for kind in self.kinds]
        if min(counts) < least:
            number = {1: "one", 2: "two"}.get(least, str(least))
            if len(self.kinds) == 1:
                clips = "clip" if least == 1 else "clips"
                raise ValueError(f"{self.name} needs at least {number} {clips}, and there are {counts[0]}.")
            raise ValueError(
                f"{self.name} needs at least {number} real and {number} generated clips, and there are "
                f"{counts[0]} and {counts[1]}."
            )

    def influences(self) -> tuple[Tensor, list[Tensor]]:
        """The value, and for each kind its derivative by the weight of each clip, see `bootstrap`."""
        raise NotImplementedError

    def interval(self, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Bootstrap confidence interval of the value over another draw of as many clips: clips, never frames.

        It says how far the number would move with other clips, at this number of clips. It does not take away the
        bias that some measures have at few clips (Frechet distances are too large, inception scores too small), as
        published numbers have it too: compare at equal n. See `bootstrap` for the method.
        """
        with self.gathered():
            value, influences = self.influences()
            low, high = bootstrap(float(value), influences, level, resamples, seed)
            return max(self.least, low), high

    def details(self) -> dict[str, Any]:
        """What a subclass prints beyond the clips."""
        return {}

    def summary(self) -> dict[str, Any]:
        """What must be printed beside the number: clips, frames, resolution, and how and with what they are seen."""
        with self.gathered():
            one = len(self.kinds) == 1
            counts = {"n" if one else f"n_{k}": int(getattr(self, f"n_{k}")) for k in self.kinds}
            sizes = {f"resolution{'' if one else f'_{k}'}": resolution(getattr(self, f"{k}_shape")) for k in self.kinds}
            return {"name": self.name, **counts, "frames": self.frames or None, **sizes, **self.details()}


def resolution(shape: Tensor) -> str | None:
    """The "HxW" of an (f, h, w) state, None before the first clip."""
    return f"{int(shape[1])}x{int(shape[2])}" if shape.any() else None
