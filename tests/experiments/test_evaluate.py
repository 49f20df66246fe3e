"""The commands of evaluation: the paper's two benchmarks, any clips and prompts, and the table beside what is known."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from datamodules import scoring
from datamodules.video_sources import Clip
from experiments import build, evaluate, sampling
from experiments.benchmarks import Task
from experiments.config import Config, load
from experiments.published import TABLE, column, long, markdown, published
from experiments.scores import check
from lightning_modules.metrics import FrechetInceptionDistance
from tests.experiments.sets import frames, make_msrvtt, make_ucf101, write


def run(config: Config, what: str, *settings: str) -> dict[str, Any]:
    """The command, as typed, and the JSON that it leaves."""
    evaluate.main([what, config.page, *settings])
    return json.loads((build.run_folder(config, "evaluate") / f"{what}.json").read_text())


def refused(config: Config, capsys: pytest.CaptureFixture[str], what: str, *settings: str) -> str:
    """The sentence that the command ends with."""
    with pytest.raises(SystemExit) as end:
        evaluate.main([what, config.page, *settings])
    message = str(end.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def manifest_prompt(samples: dict[str, Any]) -> str:
    return str(sampling.read_manifest(Path(samples["folder"]))["prompts"][0])


@pytest.fixture
def alone(trained: Config) -> Config:
    """The trained cascade, without what was evaluated before."""
    shutil.rmtree(build.run_folder(trained, "evaluate"), ignore_errors=True)
    return trained


def test_ucf101_from_its_own_layout_to_the_table(
    alone: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_ucf101(tmp_path)
    result = run(alone, "ucf101", f"ucf101={tmp_path}", "ucf101_samples=4", "splits=2", "workers=1")
    assert set(result["scores"]) == {"fvd_random", "kvd_random", "is_random"}
    for name, score in result["scores"].items():
        low, high = score["interval"]
        assert low < high and score["name"] == name and "random" in score["weights"]
    assert result["scores"]["fvd_random"]["n_real"] == result["scores"]["kvd_random"]["n_fake"] == 4
    samples, real = result["samples"], result["real"]
    assert (samples["n"], samples["frames"], samples["resolution"], samples["output"]) == (4, 16, 32, "upsampled")
    assert samples["fps"] == alone.cascade.fps and samples["seeds"] == "sample_seed(0, k) of sample k"
    assert samples["cut"] == "none: their pixels as they are" and result["setting"] == "zero-shot"
    assert real["n"] == 4 and real["fps"] > samples["fps"]  # its clips are shorter than 16 frames take at that rate
    assert result["skipped"] == {"generated": {}, "real": {}}
    assert 0 < result["waiting"] < 1 and result["seconds"]["waiting"] < result["seconds"]["scoring"]
    assert {"4 samples in place of 10,000", "resolution 32 in place of 256"} <= set(result["notes"])
    assert not any("frames" in note or "output" in note for note in result["notes"])  # these are the paper's
    real_clips = json.loads((Path(samples["folder"]) / "real.json").read_text())
    assert Path(real_clips[manifest_prompt(samples)]).is_file() and len(real_clips) == 3
    assert {"Make-A-Video", "Snap Video"} <= {row["method"] for row in result["published"]}
    manifest = sampling.read_manifest(Path(samples["folder"]))
    assert manifest["digest"] == samples["digest"] and len(manifest["prompts"]) == 4
    assert load(str(build.run_folder(alone, "evaluate") / "ucf101.yaml")).evaluate.ucf101_samples == 4
    printed = capsys.readouterr().out
    page = (build.run_folder(alone, "evaluate") / "ucf101.md").read_text()
    assert page in printed and "of scoring was waiting for data" in printed
    assert "| Make-A-Video | zero-shot | 256 | 367.23 |" in page and "**ours" not in page
    assert re.search(r"\| fvd_random \| [\d.]+ \([\d.]+ to [\d.]+\) \|", page)
    (table,) = build.run_folder(alone, "evaluate").glob("wandb/offline-run-*/files/media/table/**/*.table.json")
    logged = json.loads(table.read_text())
    assert {"Make-A-Video", "ours, micro"} <= {row[0] for row in logged["data"]}
    assert len(logged["data"]) == len(published("ucf101")) + 3
    assert "there is no" in refused(alone, capsys, "ucf101", f"ucf101={tmp_path}/nowhere")
    given = [f"ucf101={tmp_path}", f"generated={samples['folder']}", "splits=2", "workers=0"]
    assert "evaluate.setting= says it" in refused(alone, capsys, "ucf101", *given)
    theirs = run(alone, "ucf101", *given, "setting=fine-tuned")
    assert theirs["scores"] == result["scores"] and theirs["setting"] == "fine-tuned"
    assert "4 samples in place of 10,000" in theirs["notes"]  # though 10,000 is what would have been generated


def test_msrvtt_from_its_own_layout_to_the_table(
    alone: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_msrvtt(tmp_path)
    monkeypatch.setattr(FrechetInceptionDistance, "interval", lambda metric: (0.0, 1.0))  # of 2048 dimensions: seconds
    write(tmp_path / "TestVideo" / "video7011.mp4", frames(2))  # too short
    settings = [f"msrvtt={tmp_path}", "msrvtt_captions=one", "cascade.frames=4", "workers=0"]
    result = run(alone, "msrvtt", *settings)
    assert set(result["scores"]) == {"fid_random", "clip_fid", "clipsim"}
    assert result["samples"]["n"] == 3 and result["real"]["n"] == 2
    assert result["scores"]["clipsim"]["backbone"].startswith("ours-micro-")
    assert result["skipped"]["real"] == {"the clip is too short for 4 frames": 1}
    for note in (
        "7 captions in the set, the paper has 59,794",
        "3 samples in place of 59,794",
        "frames 4 in place of 16",
        "1 real clips left out: the clip is too short for 4 frames",
        "2 real clips, 3 generated ones",
    ):
        assert note in result["notes"]
    page = capsys.readouterr().out
    assert "| Make-A-Video | zero-shot | 256 |" in page and "13.17 [" in page and "**ours" not in page
    assert "sources disagree on what the column is: FID in the paper, CLIP-FID in arXiv 2402.14797" in page


def test_clips_and_prompts_of_ones_own_and_clips_made_elsewhere(
    alone: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples are made once for all scores; the same clips in a folder of somebody else score the same."""
    for i in range(3):
        write(tmp_path / "real" / f"{i}.mp4", frames(60, seed=i))
    (tmp_path / "p.txt").write_text("a bear\na ram\n")
    settings = [f"clips={tmp_path / 'real'}", f"prompts={tmp_path / 'p.txt'}", f"folder={tmp_path / 'made'}"]
    first = run(alone, "clipsim", *settings, "workers=0")
    assert first["samples"]["n"] == 3 and "real" not in first  # evaluate.samples of the page, the prompts in turn
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "made").glob("*.mp4")}
    fvd = run(alone, "fvd", *settings, "workers=0")
    assert fvd["real"]["path"] == str(tmp_path / "real") and fvd["scores"]["fvd_random"]["n_real"] == 3
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "made").glob("*.mp4")} == written
    ours = run(alone, "clipsim", f"generated={tmp_path / 'made'}", "workers=1")  # the same files, read by others
    assert ours["scores"] == first["scores"] and ours["samples"]["digest"] == first["samples"]["digest"]
    (tmp_path / "made" / "manifest.json").unlink()
    message = refused(alone, capsys, "clipsim", f"generated={tmp_path / 'made'}")
    assert "has 3 clips and there are 0 prompts for them" in message
    (tmp_path / "all.txt").write_text("a bear\na ram\na bear\n")
    theirs = run(alone, "clipsim", f"generated={tmp_path / 'made'}", f"prompts={tmp_path / 'all.txt'}", "workers=0")
    assert theirs["scores"] == first["scores"] and theirs["samples"]["digest"] == ""


def test_bad_clips_are_a_sentence(alone: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(what: str = "fvd", **settings: object) -> str:
        given = [f"{key}={value}" for key, value in settings.items()]
        return refused(alone, capsys, what, "workers=0", "cascade.frames=9", *given)

    one, mixed, short, real = (tmp_path / name for name in ("one", "mixed", "short", "real"))
    (tmp_path / "empty").mkdir()
    write(one / "a.mp4", frames(20))
    for name, height in (("a", 48), ("b", 48), ("c", 32)):
        write(mixed / f"{name}.mp4", frames(20, height))
        write(short / f"{name}.mp4", frames(20 if name == "a" else 8))
        write(real / f"{name}.mp4", frames(20))
    assert "no video" in message(generated=tmp_path / "empty")
    assert "There is no folder" in message(generated=tmp_path / "nowhere")
    assert "there are 1 generated clips; a score needs at least two" in message(generated=one, clips=real)
    assert "c.mp4 has frames of 64x32 pixels, those before it of 64x48" in message(generated=mixed, clips=real)
    told = message(generated=real, clips=short)
    assert "1 of the 3 clips of" in told and "2 times: the clip is too short for 9 frames (as" in told
    (short / "c.mp4").rename(short / "a.txt")
    write(short / "d.mp4", frames(20))
    told = message(generated=real, clips=short, **{"data.max_skipped": 0.1})
    assert "cannot be used, more than data.max_skipped=0.1 allows: " in told
    assert "there is no file of prompts" in message("clipsim", prompts=tmp_path / "nowhere.txt")
    assert "there is no metric 'fdv'" in message("fdv")
    assert "evaluate.output 'hgih' is not one of decoded" in message(output="hgih")
    named = {"clip_name": "ViT-Z", "prompts": three(tmp_path)}
    assert "open_clip has no model 'ViT-Z'" in message("clipsim", generated=real, **named)
    assert "there is no" in message(generated=real, clips=real, i3d=tmp_path / "nowhere.pt").lower()


def test_what_cannot_be_scored_is_told_before_anything_is_generated(
    alone: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "generate", lambda *_: pytest.fail("generated"))
    real = tmp_path / "real"
    write(real / "a.mp4", frames(20))
    (tmp_path / "wrong.pt").write_bytes(b"weights")
    settings = [f"clips={real}", f"prompts={three(tmp_path)}"]
    assert "There is no I3D weight file" in refused(alone, capsys, "fvd", *settings, "i3d=nowhere.pt")
    wrong = [f"inception={tmp_path / 'wrong.pt'}", "inception_sha256=" + "0" * 64]
    assert "has the SHA-256" in refused(alone, capsys, "fid", *settings, *wrong)
    (real / "results.csv").write_text("videoid,contentUrl,duration,page_dir,name\na,,PT1S,,bear\nb\nc\nd\n")
    told = refused(alone, capsys, "fvd", *settings)
    assert "3 of the 4 clips of" in told and "more than data.max_skipped=0.5 allows: " in told


def test_missing_files_and_unreadable_ones_count_together() -> None:
    task = Task(
        "x", [], [Clip(str(k), str(k)) for k in range(6)], "a set", [(str(k), "the file is missing") for k in "abcd"]
    )
    scored: Any = SimpleNamespace(kinds=[range(6), range(6)], counts=[6, 5], skipped=[{}, {"cut": 1}],
                                  worst=lambda kind: "1 times: cut")  # fmt: skip
    config = load("tiny")
    check(scored, config, task)  # 4 of 10 and one of the 6 others: half
    scored.counts[1] = 4
    with pytest.raises(
        ValueError, match="2 of the 6 clips of a set cannot be used, besides 4 that are not there, more than"
    ):
        check(scored, config, task)


def test_generated_clips_that_are_cut_are_told(alone: Config, tmp_path: Path) -> None:
    for k in range(2):
        write(tmp_path / "made" / f"{k}.mp4", frames(20, seed=k))
    texts = tmp_path / "two.txt"
    texts.write_text("a\nb\n")
    result = run(alone, "clipsim", f"generated={tmp_path / 'made'}", f"prompts={texts}", "resolution=32", "workers=0")
    assert result["samples"]["cut"] == "centre square, bicubic antialiased to 32"
    assert result["notes"] == ["generated clips of 64x48 pixels cut to 32x32 (centre square, bicubic antialiased)"]


def test_waiting_begins_before_the_workers_read(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(scoring.time, "perf_counter", lambda: next(clock))
    assert scoring.Scored([scoring.Shown([Clip("a", "a")], 2, 0)], 1, 0).waiting == 1


def three(folder: Path) -> Path:
    (folder / "three.txt").write_text("a\nb\nc\n")
    return folder / "three.txt"


def result_of(benchmark: str, scores: dict[str, dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    samples = {"n": 10_000, "frames": 16, "resolution": 256}
    return {"benchmark": benchmark, "size": "paper", "setting": "zero-shot", "scores": scores, "notes": notes,
            "samples": samples, "skipped": {}}  # fmt: skip


def test_only_what_earns_its_name_stands_in_the_column() -> None:
    fvd, other = {"value": 400.5, "interval": [390.0, 411.0]}, {"value": 1.5, "interval": None}
    page = markdown(result_of("ucf101", {"fvd": fvd, "is_random": other}, ["4 samples in place of 10,000"]))
    (ours,) = [line for line in page.splitlines() if "**ours, paper**" in line]
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    mark = re.search(r"\[(\d+)\] 4 samples in place of 10,000", page)
    assert mark and cells[3] == f"400.50 (390.00 to 411.00) [{mark[1]}]" and cells[5] == ""
    assert "| is_random | 1.5000 |" in page and "compare with no published number" in page
    assert column("fvd_random", {}) == column("is_random", {}) == column("fvd_short_side", {}) == ""
    assert column("clipsim", {"backbone": "ours-tiny-1234"}) == ""
    assert column("fid", {"weights": "sha256:67"}) == "FID"
    for of, name in ((("ViT-B-32", "ViT-B-16", "ViT-B-32-quickgelu"), "clipsim"), (("ViT-B-32",), "clip_fid")):
        for model in of:
            assert column(name, {"backbone": f"{model}/openai"}) == name.upper().replace("_", "-")
        for other in ("ViT-B-32/laion2b_s34b_b79k", "ViT-B-32-256/datacomp_s34b_b86k", "ViT-L-14/openai"):
            assert column(name, {"backbone": other}) == ""
    assert column("clip_fid", {"backbone": "ViT-B-16/openai"}) == ""
    rows = list(long(result_of("msrvtt", {"fid": {"value": 1.5, "interval": None}}, [])))
    assert rows[-1][:5] == ["ours, paper", "zero-shot", "256", "FID", "1.5"]


def test_all_published_rows_are_there_with_what_is_disputed() -> None:
    page = {each: markdown(result_of(each, {}, [])) for each in ("ucf101", "msrvtt")}
    with TABLE.open(newline="") as file:
        rows = list(csv.reader(file))
    assert len(published("ucf101")) + len(published("msrvtt")) == len(rows) - 1
    assert {len(row) for row in rows} == {8} and all(re.fullmatch(r"arXiv \d{4}\.\d{5}", row[6]) for row in rows[1:])
    for row in (
        "| CogVideo (Chinese) | zero-shot | 480 | 751.34 | 23.55 |",
        "| Make-A-Video | fine-tuned, class | 256 | 81.25 | 82.55 |",
        "| VideoGen | zero-shot |  | 554 | 71.61 |",
        "| Goku-2B | zero-shot | 128 | 217.24 | 42.30 |",
    ):
        assert row in page["ucf101"]
    assert re.search(r"\| TATS-base \| trained, class \| 128 \| 278 ± 11 \[\d\] \| 79.28 ± 0.38 \|", page["ucf101"])
    assert "sources disagree: 332 ± 18 in MAGVIT" in page["ucf101"]
    assert "sources disagree: or 1290" in page["msrvtt"]
    assert "| MoVideo | zero-shot |  |  | 12.71 |  | 0.3213 |" in page["msrvtt"]
    assert "| Snap Video | zero-shot | 512x288 | 104.0 |  | 8.48 | 0.2793 |" in page["msrvtt"]


def test_other_ranks_score_nothing(alone: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.parallel, "first_rank", lambda: False)
    config = replace(alone, evaluate=replace(alone.evaluate, folder=str(tmp_path / "samples")))
    assert evaluate.evaluate(config, "clipsim") == {} and len(list((tmp_path / "samples").glob("*.mp4"))) == 3
    assert not (build.run_folder(alone, "evaluate") / "clipsim.json").exists()
