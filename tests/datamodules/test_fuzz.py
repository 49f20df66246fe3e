"""Two thousand damaged files of each kind: read, or refused with a ValueError; nothing crashes, hangs or leaks."""

import io
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.clips import read_clip
from datamodules.filters import FilterConfig, Filters
from datamodules.image_text import decode, metadata, open_pairs
from datamodules.tars import Entry, scan
from datamodules.video_sources import list_clips

N = 2000
CODECS = (("libx264", "mp4"), ("libx265", "mp4"), ("libvpx-vp9", "webm"), ("libsvtav1", "mp4"))
ROOT = Path(__file__).parents[2]


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """The file cut, with bytes changed, a stretch zeroed, doubled, swapped or taken out, or nothing of it left."""
    kind = rng.integers(7)
    a, b = sorted(int(x) for x in rng.integers(0, len(data) + 1, 2))
    if kind == 0:
        return data[:a]
    if kind == 1:
        changed = np.frombuffer(data, np.uint8).copy()
        at = rng.integers(0, len(data), int(rng.integers(1, 30)))
        changed[at] = rng.integers(0, 256, len(at))
        return changed.tobytes()
    if kind == 2:
        return data[:a] + bytes(b - a) + data[b:]
    if kind == 3:
        return data[:b] + data[a:]
    if kind == 4:
        return data[:a] + data[b:]
    if kind == 5:  # in the header, where it hurts most
        head = min(len(data), 400)
        changed = np.frombuffer(data, np.uint8).copy()
        changed[rng.integers(0, head, 3)] = rng.integers(0, 256, 3)
        return changed.tobytes()
    return b"" if a % 2 else rng.bytes(b - a)


def survive(read: Callable[[bytes], object], data: bytes, n: int = N) -> int:
    """How many of `n` damaged files could be read all the same; anything but a ValueError fails."""
    rng, good = np.random.default_rng(0), 0
    for _ in range(n):
        try:
            read(damaged(data, rng))
            good += 1
        except ValueError as error:
            assert str(error), "the cause is empty"
    return good


def picture(kind: str) -> bytes:
    rng, file, exif = np.random.default_rng(1), io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned
    pixels = np.kron(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    Image.fromarray(pixels).save(file, kind, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures(kind: str) -> None:
    good = survive(lambda data: decode(data, 32), picture(kind))
    assert 0 < good < N


def test_a_decompression_bomb() -> None:
    file = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(file, "PNG")
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(file.getvalue(), 32)


@pytest.mark.parametrize("kind", ["json", "txt"])
def test_captions(kind: str, tmp_path: Path) -> None:
    text = "ein Fuchs, ein 🦊 und ein 東京".encode()
    meta = json.dumps({"caption": "a fox 🦊", "alt_captions": ["x", 3, None], "width": [[[]]]}).encode()
    path = tmp_path / "member"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        return metadata(Entry(str(path), "key", {kind: (0, len(data))}))

    assert 0 < survive(read, meta if kind == "json" else text) < N


def test_deep_json(tmp_path: Path) -> None:
    path = tmp_path / "member"
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match="not valid JSON"):
        metadata(Entry(str(path), "key", {"json": (0, 100_000)}))


def test_tars(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    data, path = make_shard(tmp_path / "a.tar", 4).read_bytes(), tmp_path / "b.tar"

    def read(changed: bytes) -> None:
        path.write_bytes(changed)
        groups, cause = scan(str(path))
        for members in groups.values():
            assert all(0 <= offset and offset + size <= len(changed) for offset, size in members.values())
        if cause:
            raise ValueError(cause)

    assert 0 < survive(read, data) < N


def test_lists_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture("JPEG"))
    table = tmp_path / "list.csv"
    rows = ["filename,caption,punsafe", *(f'a.jpg,"a cat, {i}",0.{i}' for i in range(6)), "gone.jpg,a dog,0.1"]
    filters = Filters(FilterConfig(punsafe=0.5, missing="keep"))

    def read(data: bytes) -> object:
        table.write_bytes(data)
        return open_pairs([str(table)], 8, filters=filters)

    assert 0 < survive(read, "\n".join(rows).encode()) < N


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl"])
def test_lists_of_clips(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"not opened by lists")
    webvid = "\n".join(["videoid,page_dir,name", *(f'a,.,"a cat, {i}"' for i in range(6)), "gone,.,a dog"])
    spans = [{"clip_id": f"a.{i}", "span": [f"00:00:0{i}.000", f"00:00:0{i}.500"]} for i in range(5)]
    hdvila = "\n".join(json.dumps({"video_id": video, "clip": spans}) for video in ("a", "b", "a", "c", "a"))

    def read(data: bytes) -> object:
        (tmp_path / name).write_bytes(data)
        return list_clips(tmp_path / name)

    assert 0 < survive(read, (webvid if name == "list.csv" else hdvila).encode()) < N


def videos(paths: list[str], n: int) -> None:
    """Read damaged copies of each video; run in a process of its own, which a crash would end."""
    for path in map(Path, paths):
        data, copy = path.read_bytes(), path.with_name(f"copy{path.suffix}")

        def read(changed: bytes, copy: Path = copy) -> object:
            copy.write_bytes(changed)
            return read_clip(copy, 8.0, 4, 16, np.random.default_rng(0))

        start = time.monotonic()
        good = survive(read, data, n // 4)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
        good += survive(read, data, n)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / before
        left = (len(os.listdir("/proc/self/fd")) if files else 0) - files
        seen = {"name": path.name, "good": good, "grown": grown, "files": left, "seconds": time.monotonic() - start}
        print(json.dumps(seen), flush=True)


def test_videos(make_timed: Callable[..., Path], tmp_path: Path) -> None:
    """Of each codec; small and short ones, so that the damage is as often in the header as in the pictures."""
    paths = []
    for codec, kind in CODECS:
        with suppress(ValueError):  # av's own error for a codec that it has no encoder of here
            paths.append(make_timed(tmp_path / f"{codec}.{kind}", list(range(12)), codec=codec))
    code = f"from test_fuzz import videos; videos({[str(path) for path in paths]}, {N})"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    print(result.stdout)
    assert result.returncode == 0, f"exit {result.returncode} after {result.stdout}: {result.stderr[-1500:]}"
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [line["name"] for line in lines] == [path.name for path in paths] and len(paths) >= 1
    for seen in lines:
        assert 0 < seen["good"] < N and seen["grown"] < 1.2 and seen["files"] <= 0, seen
