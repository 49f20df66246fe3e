"""The dashboards show what training logs, read back from the files of real offline runs."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments import build, dashboard, watch
from experiments.config import Config, load
from experiments.flops import step_flops
from experiments.memory import inputs
from experiments.train import train
from lightning_modules.wandb_logger import history, records

ROOT = Path(__file__).parents[2]
MEDIA = re.compile(r"(.*)\.(_type|filenames|videos|values|bins|captions|count|format|height|width)")
KEPT_BY_WANDB = {"_step", "_runtime", "_timestamp", dashboard.STEP}


def logged(run: Path) -> dict[str, list[Any]]:
    """What W&B's files of a run hold: key -> its values; pictures and histograms by their own key."""
    found: dict[str, list[Any]] = {}
    for row in history(run):
        for key, value in row.items():
            media = MEDIA.fullmatch(key)
            found.setdefault(media[1] if media else key, []).append(value)
    return found


def drawn_by(panel: dict[str, Any], keys: set[str]) -> tuple[set[str], set[str]]:
    """The keys that a panel asks for, and those it would show of the keys there are. `panel` as it goes to W&B."""
    config = panel["config"]
    if config.get("useMetricRegex"):
        shown = {key for key in keys if re.fullmatch(config["metricRegex"], key)}
        return (shown or {config["metricRegex"]}), shown
    asked = set(config.get("metrics", [])) | set(config.get("mediaKeys", []))
    return asked, asked & keys


def test_no_panel_is_empty_and_no_key_without_a_panel(trained: Config) -> None:
    made = dashboard.workspace(trained, "someone", "make-a-video")
    sections = made._to_model().model_dump(by_alias=True, exclude_none=True)["spec"]["section"]["panelBankConfig"][
        "sections"
    ]
    named = {section["name"].split("(")[-1].rstrip(")"): section["panels"] for section in sections}
    assert list(named) == build.wanted(trained)
    for stage, panels in named.items():
        keys = set(logged(build.run_folder(trained, stage)))
        shown: set[str] = set()
        for panel in panels:
            asked, found = drawn_by(panel, keys)
            missing = {key for key in asked - found if not re.search(r"/loss/t\d$", key)}  # 8 samples may leave one out
            assert found and not missing, (stage, panel["config"], missing)
            shown |= found
        assert keys - shown == KEPT_BY_WANDB, (stage, keys - shown)
    everything = {
        key.split("/", 1)[1] for stage in named for key in logged(build.run_folder(trained, stage)) if "/" in key
    }
    for key in ("loss/t0", "loss/t3", "learning_rate", "gradient_norm", "data/seen", "data/skipped", "data/rates",
                "time/samples_per_second", "time/tflops", "time/share_of_peak", "time/share_waiting_for_data",
                "samples", "clips", "prompted", "prompted_clips", "preview/fvd_random", "preview/clipsim"):  # fmt: skip
        assert key in everything, key


def test_every_picture_and_clip_is_there(trained: Config) -> None:
    for stage in ("decoder", "decoder_video", "interpolation", "sr_low_video"):
        run = build.run_folder(trained, stage)
        (files,) = run.glob("wandb/offline-run-*/files")
        keys = logged(run)
        paths = [p for values in keys.values() for v in values if isinstance(v, list) for p in v if isinstance(p, str)]
        paths += [p["path"] for v in keys.get(f"{stage}/clips", []) if isinstance(v, list) for p in v]
        assert len(paths) >= (1 if stage == "decoder" else 2)
        for path in paths:
            assert (files / path).stat().st_size > 100, path


def test_the_resolved_config_and_the_code_are_in_the_run(trained: Config) -> None:
    run = build.run_folder(trained, "prior")
    (path,) = run.glob("wandb/offline-run-*/run-*.wandb")
    (start,) = [record.run for record in records(path) if record.HasField("run")]
    config = {update.key: json.loads(update.value_json) for update in start.config.update}
    assert config["stage"] == "prior" and config["prior"]["model"]["width"] == 32
    assert config["decoder_video"]["curriculum"]["steps"] == trained.decoder_video.curriculum.steps
    assert config["code"]["version"] and config["code"]["torch"] == torch.__version__
    assert start.run_id == (run / "wandb_id").read_text()
    if (ROOT / ".git").exists() and shutil.which("git"):
        assert re.fullmatch("[0-9a-f]{40}(-dirty)?", config["code"]["commit"])


def test_a_stopped_run_goes_on_as_one_curve(fresh: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after five steps with a checkpoint after four: no step twice, none left out, all as in metrics.csv."""
    before = watch.Samples.on_train_batch_end

    def stop(self: Any, trainer: Any, *args: Any) -> None:
        before(self, trainer, *args)
        if trainer.global_step == 6:
            raise ZeroDivisionError

    trainer = replace(fresh.clip.trainer, max_steps=8, log_checkpoints=True)
    config = replace(fresh, clip=replace(fresh.clip, trainer=trainer))
    monkeypatch.setattr(watch.Samples, "on_train_batch_end", stop)
    with pytest.raises(ZeroDivisionError):
        train(config, "clip")
    monkeypatch.undo()
    run = build.run_folder(config, "clip")
    assert [row["_step"] for row in history(run)] == [0, 1, 2, 3, 4]
    train(config, "clip")
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1  # two files of one run
    rows = list(history(run))
    assert [row["_step"] for row in rows] == [row[dashboard.STEP] for row in rows] == list(range(9))
    with (run / "metrics.csv").open() as file:
        for row, csv_row in zip(rows, csv.DictReader(file), strict=True):
            for key in ("loss", "gradient_norm", "learning_rate", "data/seen", "probe"):
                assert row.get(f"clip/{key}") == (float(csv_row[key]) if csv_row[key] else None), (row["_step"], key)
    sent = [a for path in files for r in records(path) if (a := r.artifact).name]
    assert len(sent) == 4 and all(a.type == "checkpoint" for a in sent)
    assert [set(a.aliases) for a in sent] == [{"latest", f"0000000{n}"} for n in (2, 4, 6, 8)]
    # what a crash takes from W&B's file comes back from metrics.csv
    shutil.rmtree(run / "wandb")
    curve = watch.loggers(config, "clip", 8)[-1]
    curve.finalize("success")
    curve.experiment.finish()  # type: ignore[attr-defined]
    assert [row["_step"] for row in history(run)] == list(range(8))


def test_flops_are_those_of_a_real_step() -> None:
    config = load("tiny", ["decoder.trainer.batch_size=3", "decoder.trainer.accumulate=2"])
    net = build.network(config, "decoder")
    with FlopCounterMode(display=False) as counter:
        net(**inputs(config, "decoder", net, 3)).float().square().mean().backward()
    # attention on a CPU is one operation that PyTorch does not count; here it is two products and their gradients
    assert step_flops(config, "decoder") == pytest.approx(2 * counter.get_total_flops(), rel=0.03)
    frozen, free = (step_flops(load("tiny", [f"decoder_video.freeze_spatial={s}"]), "decoder_video") for s in (1, 0))
    assert 0.5 * free < frozen < 0.95 * free
    recomputed = load("tiny", ["decoder.unet.checkpoint_activations=true"])
    assert step_flops(recomputed, "decoder") == step_flops(load("tiny"), "decoder")


def test_a_validation_set_and_published_weights_give_the_scores_their_names(trained: Config) -> None:
    assert watch.scores_of(trained, "decoder_video") == ["clipsim", "fvd_random"]
    assert watch.scores_of(trained, "decoder") == ["clipsim"] and watch.scores_of(trained, "sr_low_video") == []
    named = replace(
        trained, evaluate=replace(trained.evaluate, i3d="i3d.pt"), data=replace(trained.data, validation="x")
    )
    assert watch.scores_of(named, "decoder_video") == ["fvd"]  # that folder has no names to prompt with
    keys = {key for panel in dashboard.panels(named, "decoder_video") for key in getattr(panel, "y", [])}
    assert "decoder_video/validation/fvd" in keys and "decoder_video/preview/clipsim" not in keys


def test_without_a_key_the_dashboard_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="WANDB_API_KEY is not set.*make report SIZE=tiny"):
        dashboard.main(["tiny"])
