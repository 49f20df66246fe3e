"""Two thousand damaged files of each kind: read, or refused with a ValueError; nothing crashes, hangs or leaks."""

import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.clips import read_clip
from datamodules.image_text import decode, metadata
from datamodules.tars import Entry, scan

N = 2000
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
    rng, file = np.random.default_rng(1), io.BytesIO()
    pixels = np.kron(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    Image.fromarray(pixels).save(file, kind)
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


def videos(path: str, n: int) -> None:
    """Read damaged copies of a video; run in a process of its own, which a crash would end."""
    data, copy = Path(path).read_bytes(), Path(path).with_suffix(".copy.mp4")
    before = 0

    def read(changed: bytes) -> object:
        copy.write_bytes(changed)
        return read_clip(copy, 8.0, 4, 16, np.random.default_rng(0))

    good = survive(read, data, n // 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    good += survive(read, data, n)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / before
    left = (len(os.listdir("/proc/self/fd")) if files else 0) - files
    print(json.dumps({"good": good, "grown": grown, "files": left}))


def test_videos(make_video: Callable[..., Path], tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", list(range(24)))
    code = f"from test_fuzz import videos; videos({str(path)!r}, {N})"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, f"exit {result.returncode}: {result.stderr[-1500:]}"
    seen = json.loads(result.stdout.splitlines()[-1])
    assert 0 < seen["good"] < N and seen["grown"] < 1.2 and seen["files"] <= 0, seen
