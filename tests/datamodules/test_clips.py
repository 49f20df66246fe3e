"""The curriculum of rates, the choice of frames, and the rate that is told."""

import os
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from datamodules import clips
from datamodules.clips import Curriculum, Keep, choose_frames, choose_span, open_video, read_clip, time_stamps

CODECS = [("libx264", "mp4"), ("libx265", "mp4"), ("libvpx-vp9", "webm"), ("libsvtav1", "mp4"), ("libx264", "mkv")]
STEADY = list(range(120))  # ticks of 1/24 s
UNEVEN = [*range(0, 40), *range(40, 100, 3), *range(100, 140, 2), *range(141, 161)]  # 24, 8, 12 and 24 a second
RATES = (1.0, 3.0, 6.8, 10.0, 12.0, 17.3, 23.976, 24.0, 60.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("step", "mean"), [(0, 24.2), (500, 15.5), (1000, 6.8), (5000, 6.8)])
def test_the_curriculum_has_the_means_it_says(step: int, mean: float) -> None:
    curriculum = Curriculum(steps=1000)
    draws = [curriculum.draw(rng(i), step) for i in range(4000)]
    assert curriculum.mean(step) == pytest.approx(mean)
    assert np.mean(draws) == pytest.approx(mean, abs=0.4)
    assert 1 <= min(draws) and max(draws) <= 30


def test_the_curriculum_falls_and_is_pure() -> None:
    curriculum = Curriculum(steps=100)
    means = [curriculum.mean(step) for step in range(101)]
    assert all(a > b for a, b in zip(means, means[1:], strict=False))
    assert curriculum.draw(rng(3), 40) == curriculum.draw(rng(3), 40)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 1, "f_min": 0}, {"steps": 1, "m1": 1.5}])
def test_a_curriculum_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="curriculum"):
        Curriculum(**wrong)


def test_time_stamps() -> None:
    assert time_stamps(0.5, 4, 3).tolist() == [0.5, 0.75, 1.0]


@pytest.mark.parametrize("f", RATES)
@pytest.mark.parametrize("seed", range(5))
def test_frames_are_distinct_and_the_rate_is_that_of_the_frames_taken(f: float, seed: int) -> None:
    times = np.arange(72) / 24 + 0.04
    indices, fps = choose_frames(3.0, 24.0, times, f, 16, rng(seed))
    assert len(indices) == 16 and 0 <= indices[0] and indices[-1] < 72 and (np.diff(indices) > 0).all()
    assert fps == pytest.approx(15 / (times[indices[-1]] - times[indices[0]]))
    assert fps == pytest.approx(np.clip(f, 15 / 3.0, 24.0), rel=0.05)


def test_starts_vary_and_cover_the_clip() -> None:
    times = np.arange(72) / 24
    starts = [choose_frames(3.0, 24.0, times, 24.0, 16, rng(i))[0][0] for i in range(500)]
    assert set(starts) == set(range(57))


def test_a_source_too_short_is_refused_and_one_just_long_enough_is_taken_whole() -> None:
    times = np.arange(15) / 24
    with pytest.raises(ValueError, match="too short for 16 frames"):
        choose_frames(15 / 24, 24.0, times, 8.0, 16, rng())
    indices, fps = choose_frames(15 / 24, 24.0, times, 8.0, 15, rng())
    assert indices.tolist() == list(range(15)) and fps == pytest.approx(24)
    with pytest.raises(ValueError, match="at least 2"):
        choose_frames(15 / 24, 24.0, times, 8.0, 1, rng())


@pytest.mark.parametrize("f", [2.0, 8.0, 11.0, 24.0])
def test_the_frames_read_are_the_frames_chosen(tmp_path: Path, make_video: Any, f: float) -> None:
    path = make_video(tmp_path / "a.mp4", list(range(72)))
    video, fps = read_clip(path, f, 16, 16, rng())
    assert video.shape == (3, 16, 16, 16)
    shown = (video.float().mean((0, 2, 3)) / 3).round()  # the grey level carries the index of the frame
    assert fps == pytest.approx(15 / (float(shown[-1] - shown[0]) / 24), rel=1e-5)
    assert fps == pytest.approx(max(f, 15 / (71 / 24)), rel=0.03)


def test_a_variable_frame_rate_is_read_by_its_times(tmp_path: Path, make_video: Any) -> None:
    ticks = [*range(0, 30), *range(30, 90, 3)]  # 24 frames per second, then 8
    path = make_video(tmp_path / "a.mp4", ticks)
    for seed in range(6):
        video, fps = read_clip(path, 4.0, 8, 16, rng(seed))
        shown = (video.float().mean((0, 2, 3)) / 3).round().int().tolist()
        at = np.array([ticks[i] for i in shown]) / 24
        assert fps == pytest.approx(7 / (at[-1] - at[0]), rel=1e-3)
        assert np.abs(np.diff(at) - 0.25).max() <= 3 / 24 + 1e-6


def test_a_crop_is_the_same_in_all_frames(tmp_path: Path, make_video: Any) -> None:
    path = make_video(tmp_path / "a.mp4", list(range(24)))
    assert read_clip(path, 24, 4, 32, rng(), crop=8)[0].shape == (3, 4, 8, 8)


def test_damaged_files_are_value_errors(tmp_path: Path, make_video: Any) -> None:
    data = make_video(tmp_path / "a.mp4", list(range(48))).read_bytes()
    for name, content in {"half": data[: len(data) // 2], "empty": b"", "text": b"no video" * 99}.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="the video"):
            read_clip(path, 8, 4, 16, rng())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_clip(tmp_path / "nowhere.mp4", 8, 4, 16, rng())


def has_encoder(codec: str) -> bool:
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(("codec", "kind"), CODECS)
@pytest.mark.parametrize("ticks", [STEADY, UNEVEN], ids=["constant", "variable"])
def test_frames_show_the_times_that_were_asked_for(
    tmp_path: Path, make_timed: Any, read_ticks: Any, codec: str, kind: str, ticks: list[int]
) -> None:
    if not has_encoder(codec):
        pytest.skip(f"PyAV has no {codec} here to make a file with")
    path = make_timed(tmp_path / f"a.{kind}", ticks, codec=codec)
    times = np.array(ticks) / 24
    for seed, f in enumerate((3.0, 4.7, 6.0, 8.0, 10.9)):
        video, fps = read_clip(path, f, 8, 32, rng(seed))
        shown = read_ticks(video) / 24
        asked = time_stamps(shown[0], f, 8)
        nearest = np.abs(times[:, None] - asked).min(0)
        assert np.abs(shown - asked) == pytest.approx(nearest, abs=2.1e-3)  # webm and mkv round to milliseconds
        assert fps == pytest.approx(7 / (shown[-1] - shown[0]), rel=2e-3)
        if ticks is STEADY:
            assert fps == pytest.approx(f, rel=0.08)


def test_a_clip_at_the_native_rate_has_each_frame_once(tmp_path: Path, make_timed: Any, read_ticks: Any) -> None:
    path = make_timed(tmp_path / "a.mp4", list(range(90)), rate=Fraction(30000, 1001))
    for seed in range(4):
        video, fps = read_clip(path, 30.0, 16, 32, rng(seed))
        assert np.diff(read_ticks(video)).tolist() == [1] * 15
        assert fps == pytest.approx(30000 / 1001, rel=1e-5)


def test_no_frame_lies_outside_the_span(tmp_path: Path, make_timed: Any, read_ticks: Any) -> None:
    for name, ticks in {"a": STEADY, "b": UNEVEN}.items():
        path = make_timed(tmp_path / f"{name}.mp4", ticks)
        seen: set[int] = set()
        for seed in range(30):
            f = float(rng(seed).uniform(1, 24))
            shown = read_ticks(read_clip(path, f, 8, 16, rng(seed), span=(1.0, 3.0))[0])
            assert shown.min() >= 24 and shown.max() < 72
            seen |= set(shown.tolist())
        assert {24, [tick for tick in ticks if tick < 72][-1]} <= seen  # all of it can be reached
        with pytest.raises(ValueError, match="too short for 8 frames"):
            read_clip(path, 8, 8, 16, rng(), span=(1.0, 1.2))
        with pytest.raises(ValueError, match="outside the video"):
            read_clip(path, 8, 8, 16, rng(), span=(60.0, 70.0))


def test_spans_are_drawn_by_their_length_and_short_ones_never() -> None:
    times = np.arange(240) / 24
    spans = [(0.0, 2.0), (2.0, 2.2), (2.2, 8.2), (20.0, 30.0)]
    drawn = [choose_span(times, spans, 16, rng(i)) for i in range(400)]
    assert set(drawn) == {(0, 48), (53, 197)}
    assert np.mean([first == 0 for first, _ in drawn]) == pytest.approx(47 / (47 + 143), abs=0.06)


def test_bytes_are_read_as_a_path_is(tmp_path: Path, make_timed: Any) -> None:
    path = make_timed(tmp_path / "a.mp4", STEADY)
    (a, fps), (b, same) = (read_clip(x, 9, 8, 16, rng()) for x in (path, path.read_bytes()))
    assert fps == same and (a == b).all()


def test_static_clips_and_cuts_are_dropped(tmp_path: Path, make_video: Any, make_timed: Any) -> None:
    slow = make_video(tmp_path / "slow.mp4", list(range(48)))  # three grey levels a frame
    read_clip(slow, 24, 8, 16, rng(), keep=Keep(min_motion=2.0, max_cut=5.0))
    with pytest.raises(ValueError, match="^the clip is static$"):
        read_clip(slow, 24, 8, 16, rng(), keep=Keep(min_motion=4.0))
    read_clip(slow, 12, 8, 16, rng(), keep=Keep(min_motion=4.0))  # at half the rate there is twice the motion
    stripes = make_timed(tmp_path / "stripes.mp4", list(range(48)))
    with pytest.raises(ValueError, match="^the clip holds a cut$"):
        read_clip(stripes, 24, 8, 16, rng(), keep=Keep(max_cut=20.0))
    with pytest.raises(ValueError, match="min_motion = -1"):
        Keep(min_motion=-1)


def test_the_limits_of_keep_are_what_they_say() -> None:
    clip = torch.zeros((3, 3, 4, 4), dtype=torch.uint8)
    clip[:, 1] = 10
    clip[:, 2] = 250  # differences of 10 and 240: no wrap at zero
    Keep(min_motion=125, max_cut=240).check(clip)
    for keep, cause in ((Keep(min_motion=126), "static"), (Keep(max_cut=239), "cut")):
        with pytest.raises(ValueError, match=cause):
            keep.check(clip)


def test_a_gap_of_a_day_is_no_clip() -> None:
    times = np.append(np.arange(30) / 24, 1e5)
    with pytest.raises(ValueError, match="too unevenly"):
        choose_frames(1e5, 30 / 1e5, times, 8, 8, rng())


def patched(data: bytes, box: bytes, at: int, value: int) -> bytes:
    """An mp4 in which four bytes of its first box of a kind are another number."""
    place = data.index(box) + 4 + at
    return data[:place] + value.to_bytes(4, "big") + data[place + 4 :]


def test_a_false_duration_is_not_believed(tmp_path: Path, make_timed: Any, read_ticks: Any) -> None:
    data = make_timed(tmp_path / "a.mp4", STEADY).read_bytes()
    for box, at in ((b"mvhd", 16), (b"mdhd", 16), (b"tkhd", 20)):
        video, fps = read_clip(patched(data, box, at, 10**8), 6, 16, 32, rng())
        shown = read_ticks(video)
        assert fps == pytest.approx(6) and np.diff(shown).tolist() == [4] * 15


def test_tables_that_crash_the_decoder_end_in_value_errors(tmp_path: Path, make_timed: Any, read_ticks: Any) -> None:
    # decord ends the whole process on these: a sample beyond the file, billions of samples, a table beyond its box.
    data = make_timed(tmp_path / "a.mp4", STEADY).read_bytes()
    for box, at in ((b"stsz", 12), (b"stsz", 100), (b"stco", 8), (b"stts", 8), (b"stts", 4), (b"stsz", 8)):
        try:
            shown = read_ticks(read_clip(patched(data, box, at, 2**31 + 5), 6, 8, 16, rng())[0])
        except ValueError as error:
            assert str(error).startswith("the video")
        else:  # some damage leaves frames that can be read
            assert (np.diff(shown) > 0).all()
    for box in (b"stsz", b"stsc", b"moov"):
        with pytest.raises(ValueError, match="the video"):
            read_clip(data.replace(box, b"none"), 6, 8, 16, rng())


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_open_groups_are_read_right(tmp_path: Path, make_timed: Any, read_ticks: Any, codec: str) -> None:
    # Frames shown before the key frame that they are stored after, the default of x265: decord miscounts them.
    if not has_encoder(codec):
        pytest.skip(f"PyAV has no {codec} here to make a file with")
    video = open_video(
        make_timed(tmp_path / "a.mp4", STEADY, codec=codec, options={f"{codec[3:]}-params": "open-gop=1"})
    )
    assert not video.plain
    for first in range(0, 116, 3):
        frames = torch.from_numpy(video.frames(np.arange(first, first + 4))).permute(3, 0, 1, 2)
        assert read_ticks(frames).tolist() == list(range(first, first + 4))


@pytest.mark.parametrize(("codec", "kind"), [("libx264", "mp4"), ("libvpx-vp9", "webm")])
def test_mutated_files_are_clips_or_value_errors(tmp_path: Path, make_timed: Any, codec: str, kind: str) -> None:
    path = make_timed(tmp_path / f"a.{kind}", list(range(48)), codec=codec)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for seed in range(150):
        data, draw = whole.copy(), rng(seed)
        if seed % 3 == 0:
            data = data[: draw.integers(len(data))]
        else:
            first = draw.integers(len(data))
            data[first : first + draw.integers(1, 40)] ^= draw.integers(1, 256, dtype=np.uint8)
        try:
            assert read_clip(data.tobytes(), 8, 4, 16, rng(seed))[0].shape == (3, 4, 16, 16)
        except ValueError as error:
            assert str(error).startswith(("the video", "the clip"))


@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
def test_frames_are_turned_as_the_file_says(tmp_path: Path, wide: bool) -> None:
    """Of a white, a grey and a dark corner, all eight ways to store a picture, as phones do."""
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:32, :48], upright[:32, 48:], upright[32:, :48] = 250, 170, 90
    stored = {(1, 0, 0, 1): upright, (-1, 0, 0, 1): upright[:, ::-1], (1, 0, 0, -1): upright[::-1]}
    stored |= {(-1, 0, 0, -1): upright[::-1, ::-1], (0, 1, 1, 0): upright.swapaxes(0, 1)}
    stored |= {(0, 1, -1, 0): np.rot90(upright), (0, -1, 1, 0): np.rot90(upright, -1)}
    stored |= {(0, -1, -1, 0): upright[::-1, ::-1].swapaxes(0, 1)}
    for signs, pixels in stored.items():
        path = tmp_path / "a.mp4"
        with av.open(str(path), "w") as file:
            stream: Any = file.add_stream("libx264", rate=24)
            stream.width, stream.height, stream.pix_fmt = pixels.shape[1], pixels.shape[0], "yuv420p"
            for _ in range(8):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
        data = path.read_bytes()
        start = data.index(b"tkhd") + 4
        a, b, c, d = (0x10000 * sign for sign in signs)
        matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
        data = data[: start + 40] + matrix + data[start + 76 :]
        if wide:  # a version 1 header; what is after it in the file is not moved, the frames lie before
            old = data[start : start + 84]
            new = b"\1" + old[1:4] + bytes(16) + old[12:20] + bytes(4) + old[20:24] + old[24:]
            data = data[: start - 8] + struct.pack(">I", len(new) + 8) + b"tkhd" + new + data[start + 84 :]
            for box in (b"moov", b"trak"):
                at = data.index(box) - 4
                data = data[:at] + struct.pack(">I", struct.unpack(">I", data[at : at + 4])[0] + 12) + data[at + 4 :]
        path.write_bytes(data)
        for source in (path, data):
            frames = open_video(source).frames(np.array([1, 6]))
            assert frames.shape == (2, *upright.shape), signs
            assert np.abs(frames.astype(int) - upright).mean() < 4, signs
            assert read_clip(source, 24, 4, 16, rng())[0].shape == (3, 4, 16, 16)
    with av.open(str(path)) as file:
        assert next(file.decode(video=0)).rotation % 180 == 90  # FFmpeg reads the file as we mean it


def test_frames_that_would_fill_the_memory_are_refused(
    tmp_path: Path, make_video: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.mp4", list(range(24)))  # 64 x 48
    monkeypatch.setattr(clips, "LARGEST_CLIP", 4 * 64 * 48)
    assert read_clip(path, 24, 4, 16, rng())[0].shape == (3, 4, 16, 16)
    with pytest.raises(ValueError, match="^the video's frames are too large$"):
        read_clip(path, 24, 5, 16, rng())
    monkeypatch.setattr(clips, "LARGEST", 64 * 48 - 1)
    with pytest.raises(ValueError, match="^the video's frames are too large$"):
        read_clip(path, 24, 2, 16, rng())


def test_a_wrong_extension_a_picture_and_a_folder(tmp_path: Path, make_timed: Any) -> None:
    path = make_timed(tmp_path / "a.webm", STEADY, codec="libvpx-vp9")
    os.rename(path, tmp_path / "a.mp4")  # a video all the same
    assert len(open_video(tmp_path / "a.mp4").times) == 120
    one = make_timed(tmp_path / "one.mp4", [0])
    for wrong in (one, tmp_path, Path(__file__)):
        with pytest.raises(ValueError, match="the video"):
            read_clip(wrong, 8, 4, 16, rng())
