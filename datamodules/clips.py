"""Clips at a chosen frame rate: the curriculum of rates, the choice of frames, decoding.

Make-A-Video conditions on the frame rate and moves it from high to low in training (arXiv 2209.14792,
section 3). The paper says "a beta function" and no more; the constants are ours.
"""

from dataclasses import dataclass
from pathlib import Path

import decord
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.pixels import random_crop, square


@dataclass(frozen=True)
class Curriculum:
    """Frame rates of training clips: high at first (little motion), low later (much motion).

    With progress s = min(step / steps, 1) and mean m(s) = m0 + (m1 - m0) s,
    u ~ Beta(k m(s), k (1 - m(s))) and f = f_min + (f_max - f_min) u.
    The defaults have a mean of 24.2 frames per second at the start and 6.8 at the end.
    """

    steps: int  # training steps until the final distribution is reached
    f_min: float = 1.0  # frames per second
    f_max: float = 30.0
    m0: float = 0.8  # mean of u at the start and, m1, at the end; between 0 and 1
    m1: float = 0.2
    k: float = 5.0  # concentration: the larger, the closer f stays to its mean

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"The curriculum has steps = {self.steps}; give at least 1.")
        if not 0 < self.f_min <= self.f_max:
            raise ValueError(
                f"The curriculum goes from f_min = {self.f_min} to f_max = {self.f_max}; "
                "give 0 < f_min <= f_max, in frames per second."
            )
        if not (0 < self.m0 < 1 and 0 < self.m1 < 1 and self.k > 0):
            raise ValueError(
                f"The curriculum has m0 = {self.m0}, m1 = {self.m1}, k = {self.k}; "
                "give means between 0 and 1 and a positive concentration."
            )

    def mean(self, step: int) -> float:
        """The mean rate at a training step, in frames per second."""
        return self.f_min + (self.f_max - self.f_min) * self._mean_u(step)

    def draw(self, rng: np.random.Generator, step: int) -> float:
        """A rate for a clip of this training step, in frames per second."""
        m = self._mean_u(step)
        return self.f_min + (self.f_max - self.f_min) * float(rng.beta(self.k * m, self.k * (1 - m)))

    def _mean_u(self, step: int) -> float:
        return self.m0 + (self.m1 - self.m0) * min(step / self.steps, 1.0)


def time_stamps(start: float, f: float, frames: int) -> np.ndarray:
    """The times t0 + i / f of a clip's frames: (frames,) float64, seconds."""
    return start + np.arange(frames) / f


def choose_frames(
    duration: float,
    native_fps: float,
    frame_times: np.ndarray,
    f: float,
    frames: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, float]:
    """Indices (frames,) of the source frames nearest to a clip at `f` frames per second with a random
    start, and the rate achieved: (frames - 1) / (t_last - t_first) of the frames taken.

    duration: seconds. frame_times: (n,) rising, seconds, of all source frames. `f` is clamped to
    [(frames - 1) / duration, native_fps]. Raises ValueError for a source too short for that.
    """
    if frames < 2:
        raise ValueError(f"a clip of {frames} frames has no rate; ask for at least 2")
    # Nothing is shown after the last frame began, so that a clip cannot span more than first to last frame.
    span = min(duration, float(frame_times[-1] - frame_times[0]))
    if len(frame_times) < frames or span * native_fps < (frames - 1) * (1 - 1e-3):
        raise ValueError(f"the clip is too short for {frames} frames")
    f = max(min(f, native_fps), (frames - 1) / span)  # by rounding the floor may pass the cap, never by more
    room = float(frame_times[-1]) - (frames - 1) / f
    # Start on a frame: at the native rate, stamps halfway between frames would round to doubles and gaps.
    starts = frame_times[frame_times <= max(room, float(frame_times[0])) + 1e-6]
    stamps = time_stamps(float(rng.choice(starts)), f, frames)
    after = np.clip(np.searchsorted(frame_times, stamps), 1, len(frame_times) - 1)
    indices = np.where(stamps - frame_times[after - 1] <= frame_times[after] - stamps, after - 1, after)
    taken = float(frame_times[indices[-1]] - frame_times[indices[0]])
    return indices, (frames - 1) / taken


def read_clip(
    path: str | Path,
    f: float,
    frames: int,
    resolution: int,
    rng: np.random.Generator,
    crop: int | None = None,
) -> tuple[Tensor, float]:
    """A clip at about `f` frames per second as uint8 (3, frames, h, w), and its achieved rate.

    The short side becomes `resolution`, the centre square is cut, and with `crop` one random square of
    it, the same in all frames. Raises FileNotFoundError, and ValueError for a file that is damaged or too
    short.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no video at {path}.")
    try:
        # Opened where it is used: a reader does not survive a fork. One thread: the workers are parallel
        # already.
        reader = decord.VideoReader(str(path), num_threads=1)
        count = len(reader)
        # The stored times rather than index / rate, which is wrong for a variable frame rate.
        shown = np.asarray(reader.get_frame_timestamp(list(range(count))), dtype=np.float64).reshape(count, 2)
    except Exception as error:
        raise ValueError(f"the video cannot be opened ({type(error).__name__})") from error
    times = shown[:, 0]
    if count < 2 or not (np.isfinite(shown).all() and (np.diff(times) > 0).all()):
        raise ValueError("the video has no rising time stamps")
    native_fps = (count - 1) / float(times[-1] - times[0])
    indices, achieved = choose_frames(float(shown[-1, 1] - times[0]), native_fps, times, f, frames, rng)
    try:
        pixels = reader.get_batch(indices.tolist()).asnumpy()
    except Exception as error:
        raise ValueError(f"the video's frames cannot be decoded ({type(error).__name__})") from error
    squares = np.stack([np.asarray(square(Image.fromarray(frame), resolution)) for frame in pixels])
    return random_crop(torch.from_numpy(squares).permute(3, 0, 1, 2).contiguous(), crop, rng), achieved
