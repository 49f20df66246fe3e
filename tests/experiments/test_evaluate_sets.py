"""Prompts of all forms, and the two sets as they are distributed."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.benchmarks import (
    SENTENCES,
    Task,
    folder_task,
    msrvtt,
    names,
    read_msrvtt,
    read_prompts,
    read_sentences,
    read_ucf101,
    shares,
    some,
    ucf101,
)
from experiments.config import Config, load
from tests.experiments.sets import CLASSES, frames, make_msrvtt, make_ucf101, write

UCF101_SHA256 = "b504473f3ab42926a62c755e6bdb3949b72a9ebe7e044112813fe659e555116f"
UCF101 = """ApplyEyeMakeup ApplyLipstick Archery BabyCrawling BalanceBeam BandMarching BaseballPitch Basketball
BasketballDunk BenchPress Biking Billiards BlowDryHair BlowingCandles BodyWeightSquats Bowling BoxingPunchingBag
BoxingSpeedBag BreastStroke BrushingTeeth CleanAndJerk CliffDiving CricketBowling CricketShot CuttingInKitchen Diving
Drumming Fencing FieldHockeyPenalty FloorGymnastics FrisbeeCatch FrontCrawl GolfSwing Haircut Hammering HammerThrow
HandstandPushups HandstandWalking HeadMassage HighJump HorseRace HorseRiding HulaHoop IceDancing JavelinThrow
JugglingBalls JumpingJack JumpRope Kayaking Knitting LongJump Lunges MilitaryParade Mixing MoppingFloor Nunchucks
ParallelBars PizzaTossing PlayingCello PlayingDaf PlayingDhol PlayingFlute PlayingGuitar PlayingPiano PlayingSitar
PlayingTabla PlayingViolin PoleVault PommelHorse PullUps Punch PushUps Rafting RockClimbingIndoor RopeClimbing Rowing
SalsaSpin ShavingBeard Shotput SkateBoarding Skiing Skijet SkyDiving SoccerJuggling SoccerPenalty StillRings
SumoWrestling Surfing Swing TableTennisShot TaiChi TennisSwing ThrowDiscus TrampolineJumping Typing UnevenBars
VolleyballSpiking WalkingWithDog WallPushups WritingOnBoard YoYo""".split()


def with_(config: Config, **settings: object) -> Config:
    return replace(config, evaluate=replace(config.evaluate, **settings))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ucf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ucf101(tmp_path_factory.mktemp("ucf"))


def test_every_class_of_ucf101_has_one_sentence_of_its_own() -> None:
    sentences = read_sentences()
    assert len(UCF101) == 101 and list(sentences) == UCF101
    assert len(set(sentences.values())) == 101
    # Another sentence makes other samples: scores of before would not compare.
    assert hashlib.sha256(SENTENCES.read_bytes()).hexdigest() == UCF101_SHA256
    assert all(5 <= len(sentence.split()) <= 16 and sentence.strip() == sentence for sentence in sentences.values())


def test_classes_come_in_their_shares_and_fewer_samples_are_the_beginning_of_more() -> None:
    counts = {name: 70 + 37 * i % 51 for i, name in enumerate(UCF101)}
    total, chosen = sum(counts.values()), shares(counts, 10_000)
    taken = Counter(chosen)
    assert len(chosen) == 10_000
    assert all(abs(taken[name] - 10_000 * count / total) < 1 for name, count in counts.items())
    assert shares(counts, 2048) == chosen[:2048]
    assert shares({"a": 3, "b": 1, "c": 0}, 4) == ["a", "a", "b", "a"]


def test_ucf101_is_read_as_it_is_distributed(ucf: Path) -> None:
    clips, counts, problems = read_ucf101(str(ucf))
    assert counts == CLASSES and problems == []
    assert [clip.key for clip in clips][4] == "HandstandPushups/v_HandStandPushups_g08_c01.avi"
    assert not any("g10" in clip.key for clip in clips[-2:])  # that one is in the test list
    task = ucf101(with_(load("tiny"), ucf101=str(ucf), ucf101_samples=8))
    sentences = read_sentences()
    assert Counter(task.prompts) == {sentences[name]: n for name, n in CLASSES.items()}
    assert UCF101_SHA256[:12] in task.notes[0] and task.samples == 10_000
    assert Path(task.beside[sentences["YoYo"]]).name == "v_YoYo_g08_c01.avi" and len(task.beside) == 3
    assert task.notes[1:] == [
        "3 classes in place of 101",
        "8 clips in the training set in place of 9,537",
    ]


def test_what_is_wrong_with_ucf101_is_a_sentence(ucf: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name the folder of UCF-101"):
        read_ucf101("")
    with pytest.raises(FileNotFoundError, match="there is no .*UCF-101"):
        read_ucf101(str(tmp_path))
    (tmp_path / "UCF-101").symlink_to(ucf / "UCF-101")
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    for name in ("classInd.txt", "trainlist01.txt"):
        (lists / name).write_bytes((ucf / "ucfTrainTestlist" / name).read_bytes())
    listed = (lists / "trainlist01.txt").read_text().split("\n")
    (lists / "trainlist01.txt").write_text("\n".join([*listed, "YoYo/v_YoYo_g25_c01.avi 3"]))
    clips, counts, problems = read_ucf101(str(tmp_path))
    assert len(clips) == 8 and counts["YoYo"] == 3 and [cause for _, cause in problems] == ["the file is missing"]
    (lists / "trainlist01.txt").write_text("\n".join(line for line in listed if "YoYo" not in line))
    with pytest.raises(ValueError, match="the class YoYo is not in trainlist01.txt"):
        read_ucf101(str(tmp_path))
    (lists / "trainlist01.txt").write_text("\n".join([*listed[:6], "YoYo/v_YoYo_g25_c01.avi 3"]))
    with pytest.raises(ValueError, match="the class YoYo has none of its videos"):
        read_ucf101(str(tmp_path))
    (lists / "trainlist01.txt").write_text("a line of something else\n")
    with pytest.raises(ValueError, match="is not of UCF-101's form"):
        read_ucf101(str(tmp_path))
    (lists / "trainlist01.txt").write_text("\n".join(listed))
    (lists / "classInd.txt").write_text("\n")
    with pytest.raises(ValueError, match="is not of UCF-101's form"):
        read_ucf101(str(tmp_path))


def test_msrvtt_begins_with_one_caption_for_each_video(tmp_path: Path) -> None:
    make_msrvtt(tmp_path)
    captions, clips, problems = read_msrvtt(str(tmp_path))
    assert [clip.key for clip in clips] == ["video7010", "video7011", "video7012"] and problems == []
    assert [text for _, text in captions] == [
        *(f"caption {k} of video{v}" for k in (0, 1) for v in (7010, 7011, 7012)),
        "one more",
    ]
    config = with_(load("tiny"), msrvtt=str(tmp_path))
    task = msrvtt(config)
    assert len(task.prompts) == 7 and len(task.clips) == 3
    assert "7 captions in the set, the paper has 59,794" in task.notes  # told, as 59,800 would be
    assert task.samples == 59_794 and Path(task.beside["one more"]).name == "video7011.mp4"
    one = msrvtt(with_(config, msrvtt_captions="one"))
    assert one.prompts == task.prompts[:3] and any(note.startswith("one caption of each video") for note in one.notes)
    assert msrvtt(with_(config, msrvtt_samples=2)).prompts == task.prompts[:2]
    # The set as released has its list without sentences too, and copies of it other files; a sentence counts once.
    table = tmp_path / "test_videodatainfo.json"
    listed = json.loads(table.read_text())
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "copy_videodatainfo.json").write_text(table.read_text())
    (tmp_path / "test_videodatainfo_nosen.json").write_text(json.dumps({"videos": listed["videos"]}))
    assert read_msrvtt(str(tmp_path)) == (captions, clips, problems)
    (tmp_path / "copy_videodatainfo.json").unlink()
    (tmp_path / "other.json").unlink()
    table.rename(tmp_path / "test.json")
    assert read_msrvtt(str(tmp_path)) == (captions, clips, problems)
    (tmp_path / "TestVideo" / "video7011.mp4").unlink()
    assert [cause for _, cause in read_msrvtt(str(tmp_path))[2]] == ["the file is missing"]


def test_what_is_wrong_with_msrvtt_is_a_sentence(tmp_path: Path) -> None:
    for wrong, sentence in (("", "name the folder of MSR-VTT"), (str(tmp_path), "no test_videodatainfo.json")):
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            read_msrvtt(wrong)
    table = make_msrvtt(tmp_path) / "test_videodatainfo.json"
    with pytest.raises(ValueError, match="the split 'train' has no caption"):
        read_msrvtt(str(tmp_path), "train")
    with pytest.raises(ValueError, match="is all or one"):
        msrvtt(with_(load("tiny"), msrvtt=str(tmp_path), msrvtt_captions="some"))
    whole = json.loads(table.read_text())
    for layout in ([1, 2], {"videos": whole["videos"]}, {**whole, "videos": [{"id": 1}]}):
        table.write_text(json.dumps(layout))
        with pytest.raises(ValueError, match="is not of MSR-VTT's layout"):
            read_msrvtt(str(tmp_path))
    table.write_text(json.dumps(whole))
    for video in (tmp_path / "TestVideo").iterdir():
        video.unlink()
    with pytest.raises(FileNotFoundError, match="none of the 3 videos"):
        read_msrvtt(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a bear\n\n  a ram \n"),
        ("p.csv", 'Prompts,Category\n"a bear",animal\na ram,animal\n'),
        ("p.csv", "id,caption\n1,a bear\n2,a ram\n"),
        ("p.json", '["a bear", "a ram"]'),
        ("p.json", '[{"prompt": "a bear"}, {"prompt": "a ram"}]'),
        ("p.jsonl", '{"text": "a bear"}\n"a ram"\n'),
    ],
)
def test_prompts_in_all_forms(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == ["a bear", "a ram"]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("p.txt", " \n\n", "holds no prompt"),
        ("p.csv", "id,url\n1,2\n", "no column of prompts: it is called one of prompt"),
        ("p.json", '{"videos": [], "sentences": []}', "is no list of prompts"),
        ("p.json", "[1, 2]", "no column of prompts"),
        ("p.json", "[", "cannot be read as prompts"),
    ],
)
def test_bad_prompts_are_a_sentence(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file of prompts"):
        read_prompts(tmp_path / name)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_prompts(tmp_path / name)


def test_any_clips_and_any_prompts(tmp_path: Path) -> None:
    """The demo's own by default; elsewhere a folder has no names, and prompts are to be named."""
    task = folder_task(load("tiny"))
    assert len(task.prompts) == 32 and task.prompts[0] == "a 3D emoji of cyclone" and len(task.clips) == 96
    write(tmp_path / "clips" / "a.mp4", frames(9))
    config = with_(load("tiny"), clips=str(tmp_path / "clips"))
    with pytest.raises(FileNotFoundError, match="no CSV with the clips' names"):
        folder_task(config)
    for template in ("{x}", "{", "{1}", "{0.x}"):
        with pytest.raises(ValueError, match="is no template"):
            folder_task(with_(load("tiny"), prompt=template))
    (tmp_path / "p.txt").write_text("a bear\na ram\na goat")
    config = with_(config, prompts=str(tmp_path / "p.txt"), samples=4)
    assert folder_task(config).prompts == ["a bear", "a ram", "a goat", "a bear"]
    assert folder_task(with_(config, samples=0)).prompts == ["a bear", "a ram", "a goat"]
    assert [clip.key for clip in folder_task(config).clips] == ["a.mp4"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no video"):
        folder_task(with_(config, clips=str(tmp_path / "empty")))
    with pytest.raises(ValueError, match="no real clips to compare with"):
        folder_task(replace(with_(config, clips=""), data=replace(config.data, clips="")))


def test_of_the_pages_own_clips_those_that_it_lists(tmp_path: Path) -> None:
    """As training reads them; another set of clips is not held to the list."""
    page = with_(load("tiny"), samples=0)
    keys = [clip.key for clip in folder_task(page).clips]
    (tmp_path / "list.txt").write_text("\n".join(keys[3:6]))
    listed = replace(page, data=replace(page.data, clips_only=str(tmp_path / "list.txt")))
    task = folder_task(listed)
    assert [clip.key for clip in task.clips] == keys[3:6] and len(task.prompts) == 3 and "list.txt" in task.real
    assert set(task.prompts) < set(folder_task(page).prompts)
    other = folder_task(with_(replace(listed, data=replace(listed.data, clips="elsewhere")), clips=page.data.clips))
    assert len(other.clips) == len(keys)
    (tmp_path / "list.txt").write_text("nothing\n")
    with pytest.raises(ValueError, match="none of the clips .* is one that data.clips_only lists"):
        folder_task(listed)


def test_fewer_real_clips_are_the_beginning_of_more() -> None:
    clips = folder_task(load("tiny")).clips
    assert some(clips, 5, 0) == some(clips, 50, 0)[:5] != some(clips, 5, 1)
    assert sorted(clip.key for clip in some(clips, 1000, 0)) == sorted(clip.key for clip in clips)
    assert names("experiments/demo/clips/clips.csv")[:2] == ["cyclone", "rainbow"]
    assert Task("x", [], [], "").notes == []
