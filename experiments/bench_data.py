"""`python -m experiments.bench_data [key=value ...]`: how fast pictures and clips come, beside bare decoding and peers.

Without `images=` and `clips=` it makes its own files, of the sizes of LAION and WebVid. All contestants have the same
files, size of batch and number of worker processes, and run alone; they take turns, and the best round of each counts,
as single times mean little on shared machines. The bare limits (Pillow, decord) decode in their workers and do nothing
else: samples are listed beforehand, and no pixel is resized or leaves a worker. The peers are what one would write
without us: webdataset (`pip install -e .[bench]`) with torchvision's transforms, and PyAV from the start of a video.
"""

import csv
import io
import json
import math
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO
from unittest import mock

import av
import decord
import numpy as np
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datamodules import Curriculum, ImageTextDataModule, VideoDataModule, clips
from datamodules.tars import expand
from experiments.cli import for_people

WANTED = {"bare limit": 0.9, "webdataset": 1.5, "decord": 0.85, "PyAV": 1.5}  # speed of ours over theirs
RESUMED = "ours, resumed at half the epoch"
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
WIDTH, HEIGHT, RATE = 596, 336, 30  # WebVid's

Makers = dict[str, Callable[[], Iterable[Any]]]  # of endless batches, by contestant


@dataclass
class Bench:
    """The benchmark."""

    images: str = (
        ""  # shards as img2dataset writes them, at least one for each worker; "" makes some of each of `sides`
    )
    clips: str = ""  # a folder as WebVid has it; "" makes one
    sides: list[int] = field(default_factory=lambda: [256, 512])  # short sides of the pictures that are made
    resolutions: list[int] = field(default_factory=lambda: [64, 256])  # that they are wanted at, one for each side
    pictures: int = 512
    videos: int = 8
    video_seconds: float = 18.0
    frames: int = 16
    clip_resolution: int = 256
    batch_size: int = 64  # pictures
    clip_batch: int = 4
    workers: int = 2
    rounds: int = 3
    seconds: float = 1.5  # of pictures in a round
    clip_turns: int = 4  # batches from each worker in a round: counted, so that all read the same clips
    peers: bool = True
    output: str = "runs/bench/data.json"


@dataclass
class Row:
    """What was measured of a contestant."""

    group: str
    name: str
    rounds: list[float]  # samples per second; of a resume, which is asked for its first batch alone, none
    first: float  # seconds until the first batch is there, opening the data and starting the workers included
    ratio: float | None = None  # the speed of ours over it, by the best rounds
    met: bool | None = None  # whether that is as much as is wanted, if anything is


class Bare(Dataset[int]):
    """Does the work and gives nothing but the item's number, so that no pixel has to travel."""

    def __init__(self, items: Sequence[tuple[Any, ...]], work: Callable[..., Any]) -> None:
        self.items, self.work = items, work

    def __getitem__(self, index: int) -> int:
        self.work(*self.items[index])
        return index

    def loader(self, batch_size: int, workers: int) -> Iterable[list[int]]:
        return DataLoader(self, batch_size, sampler=cycle(range(len(self.items))), num_workers=workers, collate_fn=list)


def texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """A colour field (side, side, 3) uint8 with detail at all scales, so that it is as hard to code as a photograph."""
    total = np.full((side, side, 3), 128, dtype=np.float32)
    for octave in range(2, side.bit_length()):
        noise = Image.fromarray(rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
        large = np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
        total += 2.0 * 2 ** (-0.67 * octave) * (large - 128)
    return total.clip(0, 255).astype(np.uint8)


def make_pictures(folder: Path, side: int, n: int, shards: int) -> None:
    """`n` JPEGs of short side `side` and usual shapes, in img2dataset's layout."""
    rng = np.random.default_rng(0)
    pixels = texture(rng, 2 * side)
    folder.mkdir(parents=True)
    for shard, numbers in enumerate(np.array_split(np.arange(n), shards)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in numbers:
                width, height = rng.permutation([side, round(side * rng.choice([1, 4 / 3, 3 / 2]))])
                left, top = rng.integers(2 * side - width), rng.integers(2 * side - height)
                picture, text = io.BytesIO(), f"a photograph of something, number {number}"
                Image.fromarray(pixels[top : top + height, left : left + width]).save(picture, "JPEG", quality=90)
                meta = json.dumps({"caption": text, "width": int(width), "height": int(height)}).encode()
                for extension, data in {"jpg": picture.getvalue(), "json": meta, "txt": text.encode()}.items():
                    member = tarfile.TarInfo(f"{number:09d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def make_videos(folder: Path, n: int, seconds: float) -> None:
    """`n` h264 videos of WebVid's size: two fields, one seen through the other, that move apart. Each stands 64 times
    in the CSV, so that half an epoch is long, and decoding what a resume skips would show."""
    rng = np.random.default_rng(0)
    near, far = (texture(rng, 1024) // part for part in (2, 3))
    (folder / "mp4").mkdir(parents=True)
    for number in range(n):
        speeds = rng.uniform(0.005, 0.02, 4)
        with av.open(str(folder / "mp4" / f"{number}.mp4"), "w") as file:
            stream: Any = file.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for i in range(round(seconds * RATE)):
                shift = (0.5 + 0.5 * np.sin(speeds * i + number)) * ([1024 - HEIGHT, 1024 - WIDTH] * 2)
                a, b, c, d = shift.astype(int)
                image = near[a : a + HEIGHT, b : b + WIDTH] + far[c : c + HEIGHT, d : d + WIDTH]
                file.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
            file.mux(stream.encode())
    with (folder / "clips.csv").open("w", newline="") as table:
        csv.writer(table).writerows([["videoid", "page_dir"]] + [[str(number), "mp4"] for number in range(n)] * 64)


def places(shards: Sequence[str], resolution: int) -> list[tuple[str, int, int, int]]:
    """(shard, offset, size, resolution) of every picture."""
    found = []
    for shard in shards:
        with tarfile.open(shard, "r:") as tar:
            found += [(shard, m.offset_data, m.size, resolution) for m in tar if m.name.lower().endswith(PICTURES)]
    return found


@lru_cache(maxsize=64)
def opened(path: str) -> BinaryIO:
    return open(path, "rb")


def decode_bare(shard: str, offset: int, size: int, resolution: int) -> Image.Image:
    """A picture as it is in the file, at the scale at which ours decodes it."""
    file = opened(shard)
    file.seek(offset)
    image = Image.open(io.BytesIO(file.read(size)))
    image.draft("RGB", (resolution, resolution))
    image.load()
    return image


def read_decord(path: str, indices: list[int]) -> np.ndarray:
    """Frames (n, h, w, 3)."""
    frames: np.ndarray = decord.VideoReader(path, num_threads=1).get_batch(indices).asnumpy()
    return frames


def read_pyav(path: str, indices: list[int]) -> np.ndarray:
    """The same frames, and all before the last of them decoded."""
    taken: dict[int, np.ndarray] = {}
    with av.open(path) as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count = 1
        for i, frame in enumerate(file.decode(stream)):
            if i in indices:
                taken[i] = frame.to_ndarray(format="rgb24")
            if i == max(indices):
                break
    return np.stack([taken[i] for i in indices])


def webdataset(shards: Sequence[str], resolution: int, batch_size: int, workers: int) -> Iterable[Any]:
    """The plain loader: batches of float pictures, captions and keys."""
    import webdataset as wds
    from torchvision import transforms

    steps = [transforms.Resize(resolution), transforms.CenterCrop(resolution), transforms.ToTensor()]
    samples = wds.WebDataset(list(shards), shardshuffle=False).decode("pil")
    samples = samples.to_tuple("jpg;jpeg;png;webp", "txt", "__key__").map_tuple(transforms.Compose(steps))
    return DataLoader(samples.repeat(), batch_size, num_workers=workers)


def our_clips(bench: Bench, root: str, workers: int) -> VideoDataModule:
    """Clips whose rates go through the whole curriculum in a round."""
    curriculum, size = Curriculum(steps=(2 + bench.clip_turns) * max(bench.workers, 1)), bench.clip_resolution
    return VideoDataModule(root, bench.clip_batch, bench.frames, size, curriculum=curriculum, workers=workers)


def resumed(module: ImageTextDataModule | VideoDataModule, consumed: int) -> Iterable[Any]:
    module.load_state_dict({"consumed": consumed})
    return module.train_dataloader()


def chosen(bench: Bench, root: str, batches: int) -> list[tuple[str, list[int]]]:
    """(path, frames) of the first clips that ours reads, written down while it reads them."""
    paths = {path.stem: str(path) for path in Path(root).rglob("*.mp4")}
    calls: list[list[int]] = []
    choose = clips.choose_frames

    def record(*arguments: Any, **options: Any) -> Any:
        indices, rate = choose(*arguments, **options)
        calls.append(indices.tolist())
        return indices, rate

    with mock.patch.object(clips, "choose_frames", record):
        stream = iter(our_clips(bench, root, workers=0).train_dataloader())
        keys = [Path(key).stem for _ in range(batches) for key in next(stream)["key"]]
    if len(keys) != len(calls):
        raise ValueError(f"Some videos in {root} cannot be read; the benchmark wants whole ones.")
    return [(paths[key], indices) for key, indices in zip(keys, calls, strict=True)]


def measure(make: Callable[[], Iterable[Any]], turn: int, seconds: float, turns: float) -> tuple[float, float]:
    """Seconds until a fresh loader's first batch, and batches per second from then on.

    Workers deliver in turn: only whole turns of theirs are timed, and the first two, in which they start, are not.
    """
    start = time.perf_counter()
    stream = iter(make())
    next(stream)
    first = time.perf_counter() - start
    for _ in range((2 * turn - 1) * (turns > 0)):
        next(stream)
    done, start, passed = 0, time.perf_counter(), 0.0
    while passed < seconds and done < turns:
        for _ in range(turn):
            next(stream)
        done, passed = done + 1, time.perf_counter() - start
    return first, done * turn / max(passed, 1e-9)


def compare(
    bench: Bench, group: str, makers: Makers, size: int, seconds: float = math.inf, turns: float = math.inf
) -> list[Row]:
    """A row for each contestant. They take turns, so that a slow minute of the machine meets all of them."""
    rows = [Row(group, name, [], math.inf) for name in makers]
    for row in rows * bench.rounds:
        resumes = row.name == RESUMED
        first, speed = measure(makers[row.name], max(bench.workers, 1), seconds, 0 if resumes else turns)
        row.first = min(row.first, first)
        row.rounds += [] if resumes else [speed * size]
    for row in rows:
        if row.rounds:
            row.ratio = max(rows[0].rounds) / max(row.rounds)
            row.met = row.ratio >= WANTED[row.name] if row.name in WANTED else None
    print(f"measured: {group}", flush=True)
    return rows


def compare_pictures(bench: Bench, name: str, shards: Sequence[str], resolution: int) -> list[Row]:
    size, workers, items = bench.batch_size, bench.workers, places(shards, resolution)
    makers: Makers = {
        "ours": lambda: ImageTextDataModule(shards, size, resolution, workers=workers).train_dataloader(),
        "bare limit": lambda: Bare(items, decode_bare).loader(size, workers),
        "webdataset": lambda: webdataset(shards, resolution, size, workers),
        RESUMED: lambda: resumed(ImageTextDataModule(shards, size, resolution, workers=workers), len(items) // 2),
    }
    if not bench.peers:
        del makers["webdataset"]
    elif len(shards) < workers:
        raise ValueError(f"There are {len(shards)} shards for {workers} workers; webdataset wants one for each.")
    return compare(bench, f"pictures, {name} at {resolution}", makers, size, seconds=bench.seconds)


def compare_clips(bench: Bench, name: str, root: str) -> list[Row]:
    size, workers = bench.clip_batch, bench.workers
    items = chosen(bench, root, batches=(2 + bench.clip_turns) * max(workers, 1))
    half = len(our_clips(bench, root, 0).source()) // 2
    makers: Makers = {
        "ours": lambda: our_clips(bench, root, workers).train_dataloader(),
        "decord": lambda: Bare(items, read_decord).loader(size, workers),
        "PyAV": lambda: Bare(items, read_pyav).loader(size, workers),
        RESUMED: lambda: resumed(our_clips(bench, root, workers), half),
    }
    return compare(bench, f"clips, {name} at {bench.clip_resolution}", makers, size, turns=bench.clip_turns)


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| what | who | per second | ours / it | first batch ms |", "|---|---|---|---|---|"]
    for row in rows:
        speed, ratio = (f"{max(row.rounds):.1f}", f"{row.ratio:.2f}") if row.rounds else ("", "")
        lines.append(f"| {row.group} | {row.name} | {speed} | {ratio} | {1000 * row.first:.0f} |")
    return "\n".join(lines)


@for_people
def main(arguments: list[str]) -> None:
    bench = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Bench), OmegaConf.from_cli(arguments)))
    assert isinstance(bench, Bench)
    rows: list[Row] = []
    with TemporaryDirectory() as made:
        for side, resolution in zip(bench.sides, bench.resolutions, strict=True):
            if not bench.images:
                make_pictures(Path(made, str(side)), side, bench.pictures, shards=max(bench.workers, 4))
            name, folder = (bench.images,) * 2 if bench.images else (f"{side} px", f"{made}/{side}")
            rows += compare_pictures(bench, name, expand(folder), resolution)
        if not bench.clips:
            make_videos(Path(made, "clips"), bench.videos, bench.video_seconds)
        name, folder = (bench.clips,) * 2 if bench.clips else (f"{WIDTH} x {HEIGHT}, {RATE} fps", f"{made}/clips")
        rows += compare_clips(bench, name, folder)

    print(f"\n{bench.workers} workers on {os.cpu_count()} CPU cores; clips of {bench.frames} frames\n\n{table(rows)}\n")
    for row in rows:
        if row.met is not None:
            verdict = "met" if row.met else "MISSED"
            print(f"{row.group}: ours / {row.name} = {row.ratio:.2f}, wanted {WANTED[row.name]}: {verdict}")
    path = Path(bench.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"bench": asdict(bench), "rows": [asdict(row) for row in rows]}, indent=2))
    print(f"\n{path}")


if __name__ == "__main__":
    main(sys.argv[1:])
