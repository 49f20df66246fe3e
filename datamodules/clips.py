"""Clips at a chosen frame rate: the curriculum of rates, the choice of frames, decoding.

Make-A-Video conditions on the frame rate and moves it from high to low in training (arXiv 2209.14792,
section 3). The paper says "a beta function" and no more; the constants are ours.
"""

import io
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import av
import decord
import numpy as np
from torch import Tensor

from datamodules.pixels import LARGEST, random_crop, square

Span = tuple[float, float]  # start and end in seconds from a video's first frame; the end is not part of it

LARGEST_CLIP = 76 * 3840 * 2160  # pixels of all its frames, as they are decoded at full size: 1.9 GB
UPRIGHT: tuple[int, ...] = (1, 0, 0, 1)  # signs of a display matrix that turns nothing
PLACE_HOLDER = 19  # bytes at most, of the empty frame that follows two in one packet (Xvid in AVI, as in UCF-101)
ROUNDING = 1e-3  # seconds: lists of spans have milliseconds, and so have the times in webm and mkv files


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


@dataclass(frozen=True)
class Keep:
    """Which clips are worth training on, by the mean absolute difference of successive frames of the clip, 0..255.

    The frames are those taken, so both limits depend on the rate: at 1 frame per second all moves more than at 30.
    Data made of one shot each (WebVid) needs no `max_cut`; where cuts are listed, they are kept out by the list.
    """

    min_motion: float = 0.0  # the mean over the clip; below, it is static and dropped; 0 drops none
    max_cut: float = 0.0  # of any two successive frames; above, there is a cut between them; 0 drops none

    def __post_init__(self) -> None:
        if not (0 <= self.min_motion <= 255 and 0 <= self.max_cut <= 255):
            raise ValueError(
                f"Clips are kept by min_motion = {self.min_motion} and max_cut = {self.max_cut}; "
                "give grey levels from 0 (off) to 255."
            )

    def check(self, clip: Tensor) -> None:
        """Raises ValueError for a clip, uint8 (3, frames, h, w), that is to be dropped."""
        if not (self.min_motion or self.max_cut):
            return
        frames = clip.permute(1, 2, 3, 0).numpy()
        a, b = frames[1:], frames[:-1]
        # The difference in uint8, which has no sign: several times faster than in a wider type.
        change = (np.maximum(a, b) - np.minimum(a, b)).mean(axis=(1, 2, 3))
        if change.mean() < self.min_motion:
            raise ValueError("the clip is static")
        if self.max_cut and change.max() > self.max_cut:
            raise ValueError("the clip holds a cut")


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
    [(frames - 1) / duration, native_fps]. Raises ValueError for a source too short for that, and for one
    whose frames lie so unevenly that the rate achieved would not be within a factor of two of `f`.
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
    if not 0.5 <= taken * f / (frames - 1) <= 2:  # a gap of hours, by a wrong time stamp, is one such case
        raise ValueError(f"the video's frames lie too unevenly for {frames} frames at a rate")
    return indices, (frames - 1) / taken


@dataclass(frozen=True)
class Video:
    """A video that was looked through: where it lies, and when its frames are shown."""

    source: str | bytes  # a path, or the bytes of a file
    stamps: np.ndarray  # (n,) int64 rising, in the stream's own unit
    times: np.ndarray  # (n,) float64 rising, seconds from the first frame
    keys: np.ndarray  # (k,) int64 rising, the stamps of key frames
    plain: bool  # decord can be trusted with it
    size: int  # pixels of a frame
    matrix: tuple[int, ...] = UPRIGHT  # signs; the pixel (x, y) is shown at (a x + c y, b x + d y)
    packed: bool = False  # two frames in one packet and a place holder in the next: only counting tells them apart

    def frames(self, indices: np.ndarray) -> np.ndarray:
        """The frames at rising indices, uint8 (n, h, w, 3), upright. Raises ValueError for what cannot be decoded."""
        if self.size > LARGEST or self.size * len(indices) > LARGEST_CLIP:
            raise ValueError("the video's frames are too large")
        pixels = self._stored_frames(indices)
        a, b, c, d = self.matrix
        if a == 0 == d and b and c:
            pixels, a, d = pixels.swapaxes(1, 2), c, b
        return np.ascontiguousarray(pixels[:, :: -1 if d < 0 else 1, :: -1 if a < 0 else 1])

    def _stored_frames(self, indices: np.ndarray) -> np.ndarray:
        try:
            if self.packed:
                return self._frames_by_count(indices)
            if self.plain:
                try:
                    # One thread: the workers are parallel already.
                    reader = decord.VideoReader(_file(self.source), num_threads=1)
                    if len(reader) == len(self.stamps):
                        return reader.get_batch(indices.tolist()).asnumpy()
                except Exception:  # decord fails at some sound HEVC files, too
                    pass
            return self._frames_by_stamp(self.stamps[indices])
        except Exception as error:
            raise ValueError(f"the video's frames cannot be decoded ({type(error).__name__})") from error

    def _frames_by_stamp(self, wanted: np.ndarray) -> np.ndarray:
        # Each frame is known by its own time stamp. A quarter slower than decord, hence not for all.
        found: dict[int, np.ndarray] = {}
        with av.open(_file(self.source), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            key = self.keys[max(np.searchsorted(self.keys, wanted[0], side="right") - 1, 0)]
            container.seek(int(key), stream=stream)
            for frame in container.decode(stream):
                if frame.pts in wanted:
                    found[frame.pts] = frame.to_ndarray(format="rgb24")
                if frame.pts is not None and frame.pts >= wanted[-1]:
                    break
        return np.stack([found[stamp] for stamp in wanted.tolist()])

    def _frames_by_count(self, indices: np.ndarray) -> np.ndarray:
        # From the first frame on: a seek, as decord makes it, lands frames away from the one that was meant.
        found: dict[int, np.ndarray] = {}
        with av.open(_file(self.source), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(stream)):
                if number in indices:
                    found[number] = frame.to_ndarray(format="rgb24")
                if number == indices[-1]:
                    break
        return np.stack([found[index] for index in indices.tolist()])


def _file(source: str | bytes) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def display_matrix(file: IO[bytes], track: int) -> tuple[int, ...]:
    """The signs of (a, b, c, d) in the header of an mp4's track (ISO/IEC 14496-12, 8.3.2), as in `Video.matrix`.

    Phones store what their sensor sees, and there how it is to be turned. PyAV tells it of decoded frames alone.
    """
    while len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        if kind in (b"moov", b"trak"):
            continue  # what is in them comes next
        if size == 1:
            size = int.from_bytes(file.read(8), "big") - 8
        if size < 8:
            break
        if kind != b"tkhd":
            file.seek(size - 8, io.SEEK_CUR)
            continue
        body = file.read(size - 8) if size < 200 else b""
        wide = 12 if body[:1] == b"\x01" else 0
        if len(body) >= 76 + wide and int.from_bytes(body[12 + wide * 2 // 3 :][:4], "big") == track:
            a, b, _, c, d = np.sign(struct.unpack_from(">5i", body, 40 + wide)).tolist()
            return a, b, c, d
    return UPRIGHT


def open_video(source: str | Path | bytes) -> Video:
    """A video from a path, or from the bytes of a file. Its packets are looked through, none is decoded.

    Raises FileNotFoundError, and ValueError for what is damaged, no video, or has fewer than two frames or no time
    stamps (an AVI with h264).
    """
    source = source if isinstance(source, bytes) else str(source)
    if isinstance(source, str) and not Path(source).exists():
        raise FileNotFoundError(f"There is no video at {source}.")
    stamps: list[int] = []
    keys: list[int] = []
    counts: Counter[int] = Counter()
    open_groups, cut_off, packed = False, False, False
    try:
        with av.open(_file(source), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            size, track = stream.codec_context.width * stream.codec_context.height, stream.id
            mp4 = "mp4" in container.format.name
            unit, claimed = stream.time_base, {each.index: each.frames for each in container.streams}
            # The stored times rather than index / rate, which is wrong for a variable frame rate; and rather than
            # those of decord, which are float32. The duration that the file claims is not asked for.
            for packet in container.demux():
                cut_off |= packet.is_corrupt
                counts[packet.stream_index] += packet.size > 0
                if packet.stream_index != stream.index or packet.pts is None or packet.is_discard:
                    continue
                stamps.append(packet.pts)
                packed |= packet.size <= PLACE_HOLDER and stream.codec_context.name == "mpeg4"
                if packet.is_keyframe:
                    keys.append(packet.pts)
                open_groups |= bool(keys) and packet.pts < keys[-1]
    except Exception as error:
        raise ValueError(f"the video cannot be opened ({type(error).__name__})") from error
    if cut_off:
        raise ValueError("the video cannot be opened (it is cut off or damaged)")
    rising = np.sort(np.asarray(stamps, dtype=np.int64))
    if len(rising) < 2 or not keys or not unit or not (np.diff(rising) > 0).all():
        raise ValueError("the video has no rising time stamps")
    # decord counts frames from a key frame in stored order: where some are shown before the key frame that they are
    # stored after (open groups), it gives others than asked for. And on a file with tables that are wrong about the
    # number of frames it crashes, and the process with it.
    plain = not open_groups and all(number in (0, counts[index]) for index, number in claimed.items())
    matrix = UPRIGHT
    if mp4:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            matrix = display_matrix(file, track)
    plain &= matrix == UPRIGHT  # decord turns frames by 180 degrees, and fails at those to be turned by 90
    return Video(source, rising, (rising - rising[0]) * float(unit), np.sort(keys), plain, size, matrix, packed)


def choose_span(times: np.ndarray, spans: Sequence[Span], frames: int, rng: np.random.Generator) -> tuple[int, int]:
    """One of `spans` as the range (first, end) of the frames in it, drawn by its length in seconds.

    times: (n,) rising, seconds from the first frame. Those with fewer than `frames` frames are no candidates.
    Raises ValueError where none is left.
    """
    # Never a frame before the start; and as the end may be rounded up, none within a millisecond of it.
    firsts = np.searchsorted(times, [start - 1e-6 for start, _ in spans])
    ends = np.searchsorted(times, [end - ROUNDING for _, end in spans])
    if not (ends > firsts).any():
        raise ValueError("the span lies outside the video")
    fit = np.flatnonzero(ends - firsts >= max(frames, 2))
    if not len(fit):
        raise ValueError(f"the clip is too short for {frames} frames")
    lengths = times[ends[fit] - 1] - times[firsts[fit]]
    chosen = fit[rng.choice(len(fit), p=lengths / lengths.sum())] if len(fit) > 1 else fit[0]
    return int(firsts[chosen]), int(ends[chosen])


def take_clip(
    video: Video,
    f: float,
    frames: int,
    resolution: int,
    rng: np.random.Generator,
    crop: int | None = None,
    spans: Sequence[Span] | None = None,
    keep: Keep = Keep(),
) -> tuple[Tensor, float]:
    """A clip of an opened video at about `f` frames per second, within one of `spans` if there are any.

    Returns and raises as `read_clip`.
    """
    first, end = choose_span(video.times, spans, frames, rng) if spans else (0, len(video.times))
    times = video.times[first:end]
    duration = float(times[-1] - times[0])
    indices, achieved = choose_frames(duration, (len(times) - 1) / duration, times, f, frames, rng)
    pixels = video.frames(first + indices)
    clip = square(pixels, resolution, crop).transpose(0, 1)
    keep.check(clip)
    return random_crop(clip, crop, rng), achieved


def read_clip(
    source: str | Path | bytes,
    f: float,
    frames: int,
    resolution: int,
    rng: np.random.Generator,
    crop: int | None = None,
    span: Span | None = None,
    keep: Keep = Keep(),
) -> tuple[Tensor, float]:
    """A clip at about `f` frames per second as uint8 (3, frames, h, w), and its achieved rate.

    The short side becomes `resolution`, the centre square is cut, and with `crop` one random square of
    it, the same in all frames; frames are then not enlarged (`square`). source: a path, or the bytes of a file.
    span: the seconds from the first frame that it may show. Raises FileNotFoundError, and ValueError for a file that is
    damaged, too short or smaller than the crop, a span outside it, and a clip that `keep` drops.
    """
    return take_clip(open_video(source), f, frames, resolution, rng, crop, [span] if span else None, keep)
