"""What `inspect` tells of a set of data, by its numbers, and shows of it."""

import io
import json
import re
import tarfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from datamodules.filters import FilterConfig
from experiments.survey import inspect

OFF = FilterConfig()
Members = dict[str, dict[str, Any]]


def picture(size: tuple[int, int], color: Any = "red", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def write_shard(path: Path, samples: Members) -> Path:
    """A tar shard of {key: {extension: bytes, or an object for json}}."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, content in members.items():
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def write_video(path: Path, ticks: list[int], rate: int, size: tuple[int, int] = (64, 48)) -> Path:
    """A video with a frame at each of `ticks` (1/rate seconds), black but for the middle one, which is white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=rate, options={"crf": "10", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, rate)
        for i, tick in enumerate(ticks):
            pixels = np.full((size[1], size[0], 3), 255 * (i == len(ticks) // 2), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def row(text: str, name: str) -> list[str]:
    """The cells after the name in the one line that begins with it."""
    found = [line for line in text.splitlines() if re.match(rf" *{re.escape(name)}(  |$)", line)]
    assert len(found) == 1, (name, text)
    return found[0].split(name, 1)[1].split()


@pytest.fixture
def rated(tmp_path: Path) -> Path:
    """Two shards of five: width 100 (i + 1), height 100, punsafe i / 10 in all but the last; i + 1 words."""
    samples: Members = {}
    for i in range(10):
        text = " ".join(["word"] * (i + 1))
        meta: dict[str, Any] = {"caption": text, "width": 100 * (i + 1), "height": 100, "similarity": 0.275 + i / 200}
        meta |= {"punsafe": i / 10} if i < 9 else {}
        meta |= {"alt_captions": ["other"] if i < 3 else []}
        samples[f"{i:03d}"] = {"png": picture((100 * (i + 1), 100)), "txt": text.encode(), "json": meta}
    for shard in range(2):
        keys = list(samples)[5 * shard : 5 * shard + 5]
        write_shard(tmp_path / f"{shard}.tar", {key: samples[key] for key in keys})
    return tmp_path


@pytest.fixture
def sheet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sheet") / "sheet.png"


def test_images_are_told_by_their_numbers(rated: Path, sheet: Path) -> None:
    for source in (str(rated), f"{rated}/*.tar", f"{rated}/{{0..1}}.tar", f"file://{rated}/*.tar"):
        text = inspect(source, OFF, sheet)
        assert text.splitlines()[0] == f"{source}: images in tar shards"
        assert row(text, "files with samples") == ["2"] and row(text, "samples") == ["10"]
        assert row(text, "readable of these") == ["10"] and "unreadable" not in text
        assert row(text, "width, px") == ["100", "145", "550", "955", "1,000"]
        assert row(text, "height, px") == ["100"] * 5
        assert row(text, "width / height") == ["1", "1.45", "5.5", "9.55", "10"]
        assert row(text, "caption, words") == ["1", "1.45", "5.5", "9.55", "10"]
        assert row(text, "caption, characters") == ["4", "6.25", "26.5", "46.75", "49"]
        assert row(text, "file, bytes")[-1] == f"{len(picture((1000, 100))):,}"
        assert row(text, "alt_captions") == ["3", "30.0%"]
        assert row(text, "punsafe") == ["9", "90.0%"] and row(text, "width") == ["10", "100.0%"]


def test_samples_are_spread_evenly(rated: Path, sheet: Path) -> None:
    text = inspect(str(rated), OFF, sheet, samples=4)  # 0, 3, 6 and 9
    assert row(text, "samples") == ["10"] and row(text, "opened, evenly spread") == ["4"]
    assert row(text, "width, px") == ["100", "145", "550", "955", "1,000"]
    assert row(text, "punsafe") == ["3", "75.0%"]


def test_common_limits_are_told_where_no_filter_is_on(rated: Path, sheet: Path) -> None:
    text = inspect(str(rated), OFF, sheet)
    assert "no filter is on" in text and "pwatermark" not in text
    assert row(text, "punsafe > 0.1") == ["7", "70.0%", "1"]
    assert row(text, "similarity < 0.28") == ["1", "10.0%", "0"]
    assert row(text, "min_side < 64") == ["0", "0.0%", "0"]
    assert row(text, "min_side < 256") == ["10", "100.0%", "0"]
    assert row(text, "all together") == ["10", "100.0%", "1"]


def test_filters_that_are_on_are_told_alone_and_together(rated: Path, sheet: Path) -> None:
    filters = FilterConfig(punsafe=0.5, max_aspect=2.0, languages=["en", "de"], missing="keep")
    text = inspect(str(rated), filters, sheet)
    assert "filters that are on, missing=keep" in text and "similarity <" not in text
    assert row(text, "punsafe > 0.5") == ["3", "30.0%", "1"]
    assert row(text, "max_aspect > 2.0") == ["8", "80.0%", "0"]
    assert row(text, "languages not in en, de") == ["0", "0.0%", "10"]
    assert row(text, "all together") == ["8", "80.0%", "10"]
    filters = FilterConfig(punsafe=0.5, missing="drop")
    assert row(inspect(str(rated), filters, sheet), "all together") == ["4", "40.0%", "1"]


def test_a_missing_key_is_said_with_those_there_are(rated: Path, sheet: Path) -> None:
    text = inspect(str(rated), FilterConfig(pwatermark=0.5), sheet)
    assert row(text, "pwatermark > 0.5") == ["0", "0.0%", "10"]
    assert "stops training; keys here are alt_captions, caption, height, punsafe, similarity, width." in text
    text = inspect(str(rated), FilterConfig(min_side=64), sheet)
    assert row(text, "min_side < 64") == ["0", "0.0%", "0"] and "stops training" not in text
    with pytest.raises(ValueError, match="punsafe is 7"):
        inspect(str(rated), FilterConfig(punsafe=7), sheet)


def test_what_cannot_be_read_is_counted_by_cause(tmp_path: Path, sheet: Path) -> None:
    good = {"png": picture((8, 8)), "txt": b"a caption"}
    bad = {
        "1": good | {"png": b"no picture"},
        "2": good | {"png": b""},
        "3": good | {"json": b"{broken"},
        "4": good | {"txt": b"\xff"},
        "5": good | {"txt": b" "},
        "6": {"txt": b"no picture"},
        "7": good | {"png": picture((64, 64))[:-40]},  # the header is whole: only the sheet finds out
    }
    write_shard(tmp_path / "a.tar", {"0": good, **bad})
    (tmp_path / "b.tar").write_bytes(b"x" * 2000)
    text = inspect(str(tmp_path), OFF, sheet)
    assert row(text, "samples") == ["7"] and row(text, "readable of these") == ["1"]
    place = str(tmp_path / "a.tar")
    for line in (
        f"1  the sample lacks one of its files, as {place}:6",
        f"1  the file is not an uncompressed tar (ReadError), as {tmp_path / 'b.tar'}",
        f"2  the image cannot be opened (UnidentifiedImageError), as {place}:1",
        f"1  the json is not valid JSON, as {place}:3",
        f"1  the caption is not UTF-8, as {place}:4",
        f"1  the caption is empty, as {place}:5",
        f"1  the image cannot be decoded (OSError), as {place}:7",
    ):
        assert line in text
    assert "No filter is on, and no sample has what a common one needs." in text


def test_nothing_readable_is_told_too(tmp_path: Path, sheet: Path) -> None:
    write_shard(tmp_path / "a.tar", {"0": {"png": b"no picture", "txt": b"a caption"}})
    text = inspect(str(tmp_path), OFF, sheet)
    assert row(text, "readable of these") == ["0"] and "contact sheet: none" in text and not sheet.exists()


def test_pictures_in_a_folder_with_a_csv(tmp_path: Path, sheet: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture((40, 20), kind="JPEG"))
    (tmp_path / "table.csv").write_text("file,caption,width,height\na.jpg,two words,40,20\nb.jpg,gone,40,20\n")
    for source in (tmp_path, tmp_path / "table.csv"):
        text = inspect(str(source), OFF, sheet)
        assert text.startswith(f"{source}: images listed in a CSV file\n")
        assert row(text, "samples") == ["1"] and row(text, "caption, words") == ["2"] * 5
        assert f"1  the file is missing or of another kind, as {tmp_path / 'table.csv'}:b.jpg" in text
        assert row(text, "min_side < 64") == ["1", "100.0%", "0"]


def test_the_sheet_has_rows_of_twelve(tmp_path: Path, sheet: Path) -> None:
    shades = [(5 * i, 0, 0) for i in range(50)]
    samples: Members = {f"{i:02d}": {"png": picture((20, 10), c), "txt": b"a caption"} for i, c in enumerate(shades)}
    write_shard(tmp_path / "all.tar", samples)
    inspect(str(tmp_path / "all.tar"), OFF, sheet)
    with Image.open(sheet) as image:
        assert (image.format, image.size, image.mode) == ("PNG", (1152, 384), "RGB")
        assert image.getpixel((48, 48)) == shades[0] and image.getpixel((1151, 383)) == shades[49]
    write_shard(tmp_path / "few.tar", dict(list(samples.items())[:14]))
    inspect(str(tmp_path / "few.tar"), OFF, sheet)
    with Image.open(sheet) as image:
        assert image.size == (1152, 192)
        assert [image.getpixel((96 * i + 48, 144)) for i in range(3)] == [shades[12], shades[13], (255, 255, 255)]


def test_videos_are_told_by_their_numbers(tmp_path: Path, sheet: Path) -> None:
    write_video(tmp_path / "a.mp4", list(range(48)), 24)  # 2 s
    write_video(tmp_path / "b.mp4", list(range(480)), 30, (32, 32))  # 16 s, 30 fps
    write_video(tmp_path / "deep" / "c.mp4", list(range(10)), 10)  # 1 s, 10 frames
    write_video(tmp_path / "d.mp4", [i + i // 2 for i in range(40)], 24)  # gaps of one and of two
    (tmp_path / "e.mp4").write_bytes(b"no video")
    text = inspect(str(tmp_path), FilterConfig(punsafe=0.1), sheet)
    assert text.startswith(f"{tmp_path}: videos in a folder\n")
    assert row(text, "files with samples") == ["5"] and row(text, "readable of these") == ["4"]
    assert re.search(rf"1  the video cannot be opened \(\w+\), as {tmp_path / 'e.mp4'}:e.mp4", text)
    low, _, middle, _, high = row(text, "duration, s")
    assert (low, high) == ("1", "16") and 2 < float(middle) < 2.5
    assert row(text, "frames")[::2] == ["10", "44", "480"]
    assert row(text, "frames per second")[::4] == ["10", "30"]
    assert row(text, "width, px")[::2] == ["32", "64", "64"] and row(text, "height, px")[::4] == ["32", "48"]
    assert row(text, "variable frame rate") == ["1", "25.0%"]
    assert row(text, "too short for 16 frames at 1 fps") == ["3", "75.0%"]
    assert row(text, "too short for 16 frames at 6 fps") == ["3", "75.0%"]
    assert row(text, "too short for 16 frames at 30 fps") == ["1", "25.0%"]
    assert row(text, "too short for 16 frames at any rate") == ["1", "25.0%"]
    assert "Filters act on images alone." in text
    with Image.open(sheet) as image:  # the middle frames
        assert image.size == (1152, 96) and np.asarray(image)[8:88, 8:376].mean() > 240
        assert np.asarray(image)[:, 384:].min() == 255


def test_the_lists_of_video_are_told_apart(tmp_path: Path, sheet: Path) -> None:
    video = write_video(tmp_path / "webvid" / "mp4" / "1.mp4", list(range(24)), 24)
    (tmp_path / "webvid" / "table.csv").write_text("videoid,page_dir,name\n1,mp4,a caption\n2,mp4,gone\n")
    text = inspect(str(tmp_path / "webvid"), OFF, sheet)
    assert "videos listed in a file" in text and "1  the file is missing, as " in text
    assert row(text, "duration, s") == ["1"] * 5 and "caption" not in text

    meta = {"clips": [[0.0, 0.25], [0.25, 1.0]], "caption": "a caption"}
    broken = {"mp4": video.read_bytes(), "json": {"status": "failed_to_download"}}
    odd = {"mp4": video.read_bytes(), "json": {"clips": 3}}
    write_shard(tmp_path / "v.tar", {"1": {"mp4": video.read_bytes(), "json": meta}, "2": broken, "3": odd})
    text = inspect(str(tmp_path / "v.tar"), OFF, sheet)
    assert text.startswith(f"{tmp_path / 'v.tar'}: videos in tar shards\n") and row(text, "samples") == ["3"]
    assert f"as {tmp_path / 'v.tar'}:3" in text and row(text, "readable of these") == ["1"]
    assert row(inspect(str(video), OFF, sheet), "samples") == ["1"]
    assert f"1  video2dataset: failed_to_download, as {tmp_path / 'v.tar'}:2" in text
    assert row(text, "frames") == ["24"] * 5 and row(text, "too short for 16 frames at any rate") == ["0", "0.0%"]

    spans = [["00:00:00.000", "00:00:00.500"], ["00:00:00.500", "00:00:01.000"], ["00:01:00.000", "00:02:00.000"]]
    line = {"video_id": "1", "clip": [{"clip_id": f"1.{i}", "span": span} for i, span in enumerate(spans)]}
    (video.parent / "list.jsonl").write_text(json.dumps(line))
    text = inspect(str(video.parent / "list.jsonl"), OFF, sheet)
    assert row(text, "samples") == ["3"] and row(text, "readable of these") == ["2"]
    assert f"1  the span lies outside the video, as {video}:1.2" in text
    assert row(text, "duration, s") == ["0.5"] * 5 and row(text, "frames") == ["12"] * 5
    assert row(text, "too short for 16 frames at any rate") == ["2", "100.0%"]


def test_a_wrong_source_is_one_sentence(tmp_path: Path, sheet: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(picture((8, 8), kind="JPEG"))
    write_shard(tmp_path / "other.tar", {"1": {"flac": b"sound"}})
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    wrong: list[tuple[str, type[Exception], str]] = [
        ("nothing", FileNotFoundError, "nothing"),
        ("nothing.jsonl", FileNotFoundError, "nothing.jsonl"),
        ("{0..3}.tar", FileNotFoundError, "0.tar"),
        ("empty", FileNotFoundError, "no video"),
        ("pictures", FileNotFoundError, "pictures need a .csv beside them"),
        ("other.tar", ValueError, "expected are uncompressed tar files"),
        ("other.csv", ValueError, "has the columns a, b"),
    ]
    for name, kind, words in wrong:
        with pytest.raises(kind, match=words) as caught:
            inspect(str(tmp_path / name), OFF, sheet)
        assert len(str(caught.value).splitlines()) == 1
    assert not sheet.exists()
