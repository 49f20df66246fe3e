"""Lists of clips: what is at a path, what of it is used, what is left out and why."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.clips import take_clip
from datamodules.video_sources import list_clips, seconds, shots, spread

TICKS = list(range(96))  # four seconds


def read(clip: Any, read_ticks: Any, seed: int, f: float = 24.0) -> np.ndarray:
    """The ticks that a clip of 8 frames shows."""
    video, spans = clip.open()
    return read_ticks(take_clip(video, f, 8, 16, np.random.default_rng(seed), None, spans)[0])


def causes(problems: list[tuple[str, str]]) -> list[str]:
    return [cause for _, cause in problems]


def test_a_plain_folder_is_one_of_videos(tmp_path: Path, make_timed: Any) -> None:
    for name in ("b.MOV", "a/deep/c.mkv", "a/b.webm", "z.mp4"):
        make_timed(tmp_path / name.lower(), TICKS[:9], codec="libvpx-vp9" if "webm" in name else "libx264")
    (tmp_path / "b.mov").rename(tmp_path / "b.MOV")
    (tmp_path / "._z.mp4").write_bytes(b"what macOS leaves")
    (tmp_path / "notes.txt").write_text("no video")
    clips, problems = list_clips(str(tmp_path))
    assert [clip.key for clip in clips] == ["a/b.webm", "a/deep/c.mkv", "b.MOV", "z.mp4"] and not problems
    for clip in clips:
        assert len(clip.open()[0].times) == 9


def test_one_video_is_a_source(tmp_path: Path, make_timed: Any) -> None:
    path = make_timed(tmp_path / "a.mp4", TICKS[:9])
    ((clip,), problems) = list_clips(path)
    assert clip.key == "a.mp4" and len(clip.open()[0].times) == 9 and not problems


def test_a_csv_can_be_named_and_its_damaged_rows_are_counted(tmp_path: Path, make_webvid: Any) -> None:
    root = make_webvid(tmp_path, 2)
    table = root / "table.csv"
    with table.open("ab") as file:
        file.write(
            b'\n\nhalf\n,,,mp4,no id\n001,,x,mp4,"\xff\xfe not utf-8"\n"' + b"x" * 140_000 + b'"\n000,,x,mp4,y\n'
        )
    (root / "other.csv").write_text("videoid,page_dir\n")  # named, the one is enough
    clips, problems = list_clips(table)
    assert [clip.key for clip in clips] == ["000", "001", "001", "000"]
    assert causes(problems) == ["the row of the CSV is damaged"] * 3


def test_what_is_nothing_ends_in_a_sentence(tmp_path: Path) -> None:
    for wrong in ("nowhere", "list.jsonl", "a.csv", "x.mp4"):
        with pytest.raises(FileNotFoundError, match="There is no folder"):
            list_clips(tmp_path / wrong)
    for wrong in ("a.tar", "*.tar", "{00..03}.tar"):
        with pytest.raises(FileNotFoundError, match="There is no shard"):
            list_clips(str(tmp_path / wrong))
    with pytest.raises(FileNotFoundError, match="no video"):
        list_clips(tmp_path)


def test_failures_of_video2dataset_are_left_out_by_cause(
    tmp_path: Path, make_timed: Any, make_v2d: Any, read_ticks: Any
) -> None:
    data = make_timed(tmp_path / "a.mp4", TICKS).read_bytes()
    webm = make_timed(tmp_path / "a.webm", TICKS, codec="libvpx-vp9").read_bytes()
    shard = make_v2d(
        tmp_path / "00000.tar",
        {
            "0000": {"mp4": data, "txt": b"words", "json": {"status": "success", "caption": "words"}},
            "0001": {"txt": b"words", "json": {"status": "failed_to_download", "error_message": "404 words"}},
            "0002": {"webm": webm},
            "0003": {"mp4": data, "json": {"status": "failed_to_subsample"}},
            "0004": {"json": {"status": "two words, a caption"}},
            "0005": {"mp4": data, "json": b"{no json"},
            "0006": {"txt": b"alone"},
            "0007": {"json": b"[]"},
        },
    )
    for root in (shard, tmp_path / "{00000..00000}.tar", tmp_path / "*.tar"):
        clips, problems = list_clips(str(root))
        assert [clip.key for clip in clips] == ["0000", "0002", "0003", "0005"]
        assert sorted(causes(problems)) == [
            "the sample has no video",
            "the sample lacks one of its files",
            "video2dataset: failed",
            "video2dataset: failed_to_download",
        ]
    for clip in clips[:2]:
        assert np.diff(read(clip, read_ticks, 0)).tolist() == [1] * 7
    with pytest.raises(ValueError, match="^video2dataset: failed_to_subsample$"):
        clips[2].open()
    with pytest.raises(ValueError, match="json is damaged"):
        clips[3].open()
    only = make_v2d(tmp_path / "x.tar", {"0": {"json": {"status": "failed_to_download"}}})
    with pytest.raises(ValueError, match="has a video .1 times: video2dataset: failed_to_download"):
        list_clips(only)


def test_a_folder_of_shards_needs_no_pattern(tmp_path: Path, make_timed: Any, make_v2d: Any) -> None:
    data = make_timed(tmp_path / "a" / "a.mp4", TICKS[:9]).read_bytes()
    make_v2d(tmp_path / "1.tar", {"1": {"mp4": data}})
    make_v2d(tmp_path / "0.tar", {"0": {"mp4": data}})
    assert [clip.key for clip in list_clips(tmp_path)[0]] == ["0", "1"]


@pytest.mark.parametrize(
    "meta",
    [
        {"cuts": {"original_fps": 24.0, "cuts_original_fps": [[0, 30], [30, 34], [34, 96]]}},
        {"cuts": {"original_fps": 48.0, "cuts_original_fps": [[0, 60], [60, 68], [68, 192]]}},  # of twice the rate
        {"clips": [["00:00:00.000", "00:00:01.250"], [1.25, 34 / 24], [34 / 24, 4.0]]},
    ],
    ids=["frames", "other rate", "clips"],
)
def test_no_clip_crosses_a_cut(tmp_path: Path, make_timed: Any, make_v2d: Any, read_ticks: Any, meta: Any) -> None:
    data = make_timed(tmp_path / "a.mp4", TICKS).read_bytes()
    (clip,), _ = list_clips(make_v2d(tmp_path / "a.tar", {"0": {"mp4": data, "json": meta}}))
    firsts = []
    for seed in range(40):
        shown = read(clip, read_ticks, seed, f=float(seed % 23 + 2))
        assert shown.max() < 30 or shown.min() >= 34
        firsts.append(shown[0])
    assert 0 < sum(first < 30 for first in firsts) < 25  # the longer shot is drawn more often


def test_cuts_of_a_variable_frame_rate_are_counted_in_frames(
    tmp_path: Path, make_timed: Any, make_v2d: Any, read_ticks: Any
) -> None:
    ticks = [*range(0, 20), *range(20, 80, 4), *range(80, 110)]
    data = make_timed(tmp_path / "a.mp4", ticks).read_bytes()
    rate = 24 * (len(ticks) - 1) / ticks[-1]
    meta = {"cuts": {"original_fps": rate, "cuts_original_fps": [[0, 25], [25, 65]]}}
    (clip,), _ = list_clips(make_v2d(tmp_path / "a.tar", {"0": {"mp4": data, "json": meta}}))
    for seed in range(20):
        shown = read(clip, read_ticks, seed, f=5.0)
        assert shown.max() < ticks[25] or shown.min() >= ticks[25]


def test_a_sample_cut_out_of_a_longer_video_is_used_whole() -> None:
    times = np.arange(96) / 24
    assert shots({"clips": [["00:01:00.000", "00:01:04.000"]]}, times) is None
    assert shots({"clips": [[1.0, 3.0]]}, times) == [(1.0, 3.0)]
    assert shots({}, times) is shots({"cuts": {}, "clips": []}, times) is None
    # its cuts are still counted from the beginning of the long video
    meta = {"clips": [[60.0, 64.0]], "cuts": {"original_fps": 24, "cuts_original_fps": [[0, 1488], [1488, 3000]]}}
    (_, end), (start, _) = shots(meta, times) or []
    assert end == start == pytest.approx(2 - 0.5 / 24)
    with pytest.raises(ValueError, match="damaged"):
        shots({"clips": [["now", "then"]]}, times)


def hdvila(root: Path, videos: dict[str, list[tuple[str, str]]], more: str = "") -> Path:
    """A list with these spans of these videos."""
    lines = [
        json.dumps(
            {
                "video_id": video,
                "url": "https://www.youtube.com/watch?v=x",
                "clip": [{"clip_id": f"{video}.{i}.mp4", "span": list(span)} for i, span in enumerate(spans)],
            }
        )
        for video, spans in videos.items()
    ]
    path = root / "hdvila.jsonl"
    path.write_text("\n".join([*lines, more]))
    return path


def half_seconds(n: int) -> list[tuple[str, str]]:
    return [(f"00:00:0{i // 2}.{i % 2 * 5}00", f"00:00:0{(i + 1) // 2}.{(i + 1) % 2 * 5}00") for i in range(n)]


def test_hdvila_gives_three_clips_of_each_video_and_no_frame_outside(
    tmp_path: Path, make_timed: Any, read_ticks: Any
) -> None:
    make_timed(tmp_path / "videos" / "one.mp4", TICKS)
    make_timed(tmp_path / "two.mp4", TICKS)
    spans = {"one": half_seconds(8), "two": half_seconds(2), "gone": half_seconds(4)}
    broken = (
        '{"video_id": "one", "clip": [{"clip_id": "x", "span": ["a", "b"]}, {"clip_id": "y", "span": [2, 1]}]}\n'
        '{"video_id": 3}\nno json\n[]\n\n{"video_id": "../two", "clip": []}'
    )
    clips, problems = list_clips(hdvila(tmp_path, spans, broken))
    assert [clip.key for clip in clips] == [f"{x}.mp4" for x in ("one.0", "one.3", "one.7", "two.0", "two.1")]
    assert sorted(causes(problems)) == [
        "a span in the list is damaged",
        "a time in the list is damaged",
        "the file is missing",
        "the file is missing",
        *["the line of the list is damaged"] * 3,
    ]
    for clip in clips:
        first = 12 * int(clip.key.split(".")[1])
        for seed in range(6):
            shown = read(clip, read_ticks, seed, f=16.0)
            assert first <= shown.min() and shown.max() < first + 12


def test_a_list_without_its_videos_says_where_they_belong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 times: the file is missing.*video_id.mp4 in .*videos"):
        list_clips(hdvila(tmp_path, {"a": half_seconds(3), "b": half_seconds(1)}))


def test_three_are_the_first_the_middle_and_the_last() -> None:
    assert [spread(n) for n in range(6)] == [[], [0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 2, 4]]


def test_times() -> None:
    assert seconds("01:02:03.250") == 3723.25 and seconds("7.5") == seconds(7.5) == 7.5
    for wrong in ("", "a:b:c", "1:2", "-1", -1, None, "nan", float("inf"), [1], 10**400, f"{10**400}:0:0"):
        with pytest.raises(ValueError, match="damaged"):
            seconds(wrong)
