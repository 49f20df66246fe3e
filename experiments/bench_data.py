"""`python -m experiments.bench_data [key=value ...]`: how fast pictures and clips come, against bare decoding and peers.

Without `images=` and `clips=` it makes its own files, at the sizes of LAION and WebVid. All contestants have the same
files, number of worker processes and size of batch, and read for themselves alone; they take turns, and of each the
best round counts, because single times mean little on shared machines. The bare limits decode and nothing else: their
samples are listed beforehand, resized, moved and collected by nobody. The peers are what one would write without us:
webdataset (`pip install -e .[bench]`) with Pillow and torchvision's transforms, and PyAV from the start of each video.
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

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
WANTED = {"bare limit": 0.9, "webdataset": 1.5, "decord": 0.85, "PyAV": 1.5}  # speed of ours over theirs
LISTED = {"bare limit", "decord", "PyAV"}  # whose samples are listed beforehand: their first batch says nothing
WEBVID: Any = {"width": 596, "height": 336, "rate": 30}


@dataclass
class Bench:
    """The benchmark."""

    images: str = (
        ""  # shards as img2dataset writes them, at least one for each worker; "" makes some of each of `sides`
    )
    clips: str = ""  # a folder as WebVid has it; "" makes one
    sides: list[int] = field(default_factory=lambda: [256, 512])  # short sides of the pictures that are made
    resolutions: list[int] = field(default_factory=lambda: [64, 256])  # what becomes of them, one for each side
    pictures: int = 512
    videos: int = 8
    video_seconds: float = 18.0
    frames: int = 16
    clip_resolution: int = 256
    batch_size: int = 64  # pictures
    clip_batch: int = 4
    workers: int = 2
    rounds: int = 3
    seconds: float = 1.5  # that a contestant reads pictures in a round
    clip_batches: int = 8  # that a contestant reads in a round: counted, so that all read the same clips
    peers: bool = True
    output: str = "runs/bench/data.json"


@dataclass
class Row:
    """What was measured of one contestant, the best of its rounds; `first` is None where the samples are given."""

    group: str
    name: str
    per_second: float
    first: float | None  # seconds until the first batch is there, opening the data and starting the workers included
    rounds: list[float]


class Bare(Dataset[int]):
    """Does the work and gives nothing but the item's number, so that no pixel has to travel."""

    def __init__(self, items: Sequence[tuple[Any, ...]], work: Callable[..., Any]) -> None:
        self.items, self.work = items, work

    def __getitem__(self, index: int) -> int:
        self.work(*self.items[index])
        return index

    def loader(self, batch_size: int, workers: int) -> Iterable[list[int]]:
        """Endless, as ours: nobody's processes may rest before the last batch is in."""
        endless = cycle(range(len(self.items)))
        return DataLoader(self, batch_size, sampler=endless, num_workers=workers, collate_fn=list)


def texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """A colour field (side, side, 3) uint8 with detail at all scales, as photographs have: amplitude ~ wavelength."""
    total = np.full((side, side, 3), 128, dtype=np.float32)
    for octave in range(2, side.bit_length()):
        noise = Image.fromarray(rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8))
        large = noise.resize((side, side), Image.Resampling.BICUBIC)
        total += 3.0 * 2 ** (-0.85 * octave) * (np.asarray(large, dtype=np.float32) - 128)
    return total.clip(0, 255).astype(np.uint8)


def make_pictures(folder: Path, side: int, n: int, shards: int) -> None:
    """`n` JPEGs of short side `side` in img2dataset's layout and LAION's usual shapes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    field_side = 4 * side
    pixels = texture(rng, field_side)
    for shard, numbers in enumerate(np.array_split(np.arange(n), shards)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in numbers:
                width, height = rng.permutation([side, round(side * rng.choice([1, 4 / 3, 3 / 2]))])
                left, top = rng.integers(field_side - width), rng.integers(field_side - height)
                file = io.BytesIO()
                window = Image.fromarray(pixels[top : top + height, left : left + width])
                window.save(file, "JPEG", quality=90)
                text = f"a photograph of something, number {number}"
                meta = {"caption": text, "width": int(width), "height": int(height), "key": f"{number:09d}"}
                members = {"jpg": file.getvalue(), "json": json.dumps(meta).encode(), "txt": text.encode()}
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"{number:09d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def make_videos(folder: Path, n: int, seconds: float) -> None:
    """`n` h264 videos of WebVid's size, a camera moving over a field before which a disc moves, each 64 times in the
    CSV: half an epoch must be far enough that decoding what a resume skips would show."""
    rng = np.random.default_rng(0)
    height, width, rate = WEBVID["height"], WEBVID["width"], WEBVID["rate"]
    pixels = texture(rng, 1024)
    y, x = np.mgrid[:height, :width]
    (folder / "mp4").mkdir(parents=True)
    for number in range(n):
        speeds = rng.uniform(0.005, 0.02, 4)
        with av.open(str(folder / "mp4" / f"{number}.mp4"), "w") as file:
            stream: Any = file.add_stream("libx264", rate=rate, options={"preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for i in range(round(seconds * rate)):
                down, right, cy, cx = 0.5 + 0.5 * np.sin(speeds * i + number)
                top, left = round(down * (1024 - height)), round(right * (1024 - width))
                image = pixels[top : top + height, left : left + width].copy()
                image[(y - cy * height) ** 2 + (x - cx * width) ** 2 < 60**2] //= 2
                file.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
            file.mux(stream.encode())
    with (folder / "clips.csv").open("w", newline="") as file:
        rows = [["videoid", "page_dir", "name"]] + [[str(number), "mp4", ""] for number in range(n)] * 64
        csv.writer(file).writerows(rows)


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
    """The frames (n, h, w, 3)."""
    frames: np.ndarray = decord.VideoReader(path, num_threads=1).get_batch(indices).asnumpy()
    return frames


def read_pyav(path: str, indices: list[int]) -> np.ndarray:
    """The frames (n, h, w, 3), all before the last one decoded."""
    taken = {}
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
    """The plain loader: batches of float pictures, captions and keys; endless."""
    import webdataset as wds
    from torchvision import transforms

    steps = [transforms.Resize(resolution), transforms.CenterCrop(resolution), transforms.ToTensor()]
    samples = (
        wds.WebDataset(list(shards), shardshuffle=False).decode("pil").to_tuple("jpg;jpeg;png;webp", "txt", "__key__")
    )
    return DataLoader(samples.map_tuple(transforms.Compose(steps)).repeat(), batch_size, num_workers=workers)


def our_pictures(bench: Bench, shards: Sequence[str], resolution: int, consumed: int = 0) -> Iterable[Any]:
    module = ImageTextDataModule(shards, bench.batch_size, resolution, workers=bench.workers)
    module.load_state_dict({"consumed": consumed})
    return module.train_dataloader()


def our_clips(bench: Bench, root: str, consumed: int = 0, workers: int | None = None) -> Iterable[Any]:
    """Clips whose rates go through the whole curriculum while they are timed."""
    workers = bench.workers if workers is None else workers
    curriculum = Curriculum(steps=bench.clip_batches)
    size = bench.clip_resolution
    module = VideoDataModule(root, bench.clip_batch, bench.frames, size, curriculum=curriculum, workers=workers)
    module.load_state_dict({"consumed": consumed})
    return module.train_dataloader()


def chosen(bench: Bench, root: str, batches: int) -> list[tuple[str, list[int]]]:
    """(path, frames) of the first clips that ours reads, written down while it reads them."""
    paths = {path.stem: str(path) for path in Path(root).rglob("*.mp4")}
    calls: list[list[int]] = []
    choose = clips.choose_frames

    def record(*arguments: Any, **options: Any) -> Any:
        indices, rate = choose(*arguments, **options)
        calls.append([int(index) for index in indices])
        return indices, rate

    with mock.patch.object(clips, "choose_frames", record):
        stream = iter(our_clips(bench, root, workers=0))
        keys = [key for _ in range(batches) for key in next(stream)["key"]]
    if len(keys) != len(calls):
        raise ValueError(f"Some videos in {root} cannot be read; the benchmark wants whole ones.")
    return [(paths[key], indices) for key, indices in zip(keys, calls, strict=True)]


def measure(
    make: Callable[[], Iterable[Any]], batch: int, workers: int, seconds: float = math.inf, batches: float = math.inf
) -> tuple[float, float]:
    """Samples per second of a fresh loader with all its workers running, and seconds to its first batch."""
    turn = max(workers, 1)  # workers deliver in turn: only whole turns are timed
    start = time.perf_counter()
    stream = iter(make())
    next(stream)
    first = time.perf_counter() - start
    for _ in range(2 * turn - 1):
        next(stream)
    done, start, passed = 0, time.perf_counter(), 0.0
    while passed < seconds and done < batches:
        for _ in range(turn):
            next(stream)
        done, passed = done + turn, time.perf_counter() - start
    return done * batch / passed if done else 0.0, first


def compare(
    bench: Bench, group: str, makers: dict[str, Callable[[], Iterable[Any]]], batch: int, **span: float
) -> list[Row]:
    """A row for each contestant. They take turns, so that a slow minute of the machine meets all of them."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    for _ in range(bench.rounds):
        for name, make in makers.items():
            # of a resume it is asked how soon it is there, not how fast it goes on
            results[name].append(measure(make, batch, bench.workers, **({"batches": 0} if "resumed" in name else span)))
    rows = []
    for name, measured in results.items():
        speeds, firsts = ([one[i] for one in measured] for i in range(2))
        rows.append(Row(group, name, max(speeds), None if name in LISTED else min(firsts), speeds))
        print(f"{group}, {name}: {rows[-1].per_second:.1f} a second", flush=True)
    return rows


def compare_pictures(bench: Bench, name: str, shards: Sequence[str], resolution: int) -> list[Row]:
    if bench.peers and len(shards) < bench.workers:
        raise ValueError(f"There are {len(shards)} shards for {bench.workers} workers; webdataset wants one for each.")
    size, items = bench.batch_size, places(shards, resolution)
    makers: dict[str, Callable[[], Iterable[Any]]] = {
        "ours": lambda: our_pictures(bench, shards, resolution),
        "bare limit": lambda: Bare(items, decode_bare).loader(size, bench.workers),
    }
    if bench.peers:
        makers["webdataset"] = lambda: webdataset(shards, resolution, size, bench.workers)
    makers["ours, resumed"] = lambda: our_pictures(bench, shards, resolution, len(items) // 2)
    return compare(bench, f"pictures, {name} at {resolution}", makers, size, seconds=bench.seconds)


def compare_clips(bench: Bench, name: str, root: str) -> list[Row]:
    size, warm = bench.clip_batch, 2 * max(bench.workers, 1)
    items = chosen(bench, root, warm + bench.clip_batches)
    (table,) = Path(root).glob("*.csv")
    with table.open(newline="", errors="replace") as file:
        half = (sum(1 for _ in csv.reader(file)) - 1) // 2
    makers: dict[str, Callable[[], Iterable[Any]]] = {
        "ours": lambda: our_clips(bench, root),
        "decord": lambda: Bare(items, read_decord).loader(size, bench.workers),
        "PyAV": lambda: Bare(items, read_pyav).loader(size, bench.workers),
        "ours, resumed": lambda: our_clips(bench, root, half),
    }
    return compare(bench, f"clips, {name} at {bench.clip_resolution}", makers, size, batches=bench.clip_batches)


def speed(rows: list[Row], group: str) -> float:
    return next(row.per_second for row in rows if row.group == group and row.name == "ours")


def table(rows: list[Row]) -> str:
    """Markdown; ratios are ours over the row's."""
    lines = ["| what | who | per second | ours / it | first batch ms |", "|---|---|---|---|---|"]
    for row in rows:
        first = "" if row.first is None else f"{1000 * row.first:.0f}"
        moving = f"{row.per_second:.1f} | {speed(rows, row.group) / row.per_second:.2f}" if row.per_second else "|"
        lines.append(f"| {row.group} | {row.name} | {moving} | {first} |")
    return "\n".join(lines)


def targets(rows: list[Row]) -> list[dict[str, Any]]:
    """What is wanted of the ratios, and what became of it."""
    found = []
    for row in rows:
        if row.name in WANTED:
            ratio = speed(rows, row.group) / row.per_second
            wanted = WANTED[row.name]
            found.append(
                {"group": row.group, "over": row.name, "ratio": ratio, "wanted": wanted, "met": ratio >= wanted}
            )
    return found


@for_people
def main(arguments: list[str]) -> None:
    bench = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Bench), OmegaConf.from_cli(arguments)))
    assert isinstance(bench, Bench)
    rows: list[Row] = []
    with TemporaryDirectory() as temporary:
        for side, resolution in zip(bench.sides, bench.resolutions, strict=True):
            folder, name = bench.images, Path(bench.images).name
            if not folder:
                folder, name = f"{temporary}/{side}", f"{side} px"
                make_pictures(Path(folder), side, bench.pictures, shards=max(bench.workers, 4))
            rows += compare_pictures(bench, name, expand(folder), resolution)
        folder, name = bench.clips, Path(bench.clips).name
        if not folder:
            folder, name = f"{temporary}/clips", "{width} x {height}, {rate} fps".format(**WEBVID)
            make_videos(Path(folder), bench.videos, bench.video_seconds)
        rows += compare_clips(bench, name, folder)

    print(f"\n{bench.workers} workers, {os.cpu_count()} CPU cores, {bench.frames} frames of a clip\n\n{table(rows)}\n")
    results = targets(rows)
    for result in results:
        verdict = "met" if result["met"] else "MISSED"
        print("{group}: ours / {over} {ratio:.2f}, wanted {wanted}: ".format(**result) + verdict)
    path = Path(bench.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = {"bench": asdict(bench), "rows": [asdict(row) for row in rows], "targets": results}
    path.write_text(json.dumps(written, indent=2))
    print(f"\n{path}")


if __name__ == "__main__":
    main(sys.argv[1:])
