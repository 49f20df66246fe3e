"""`python -m experiments.dashboard SIZE [key=value ...]`: the W&B workspace of a size, saved to the user's project.

A section for each stage that the page trains. Its panels show what a stage logs and nothing else, so none is empty.
The project is $WANDB_PROJECT or make-a-video, its owner $WANDB_ENTITY or the account of the key.
"""

import os
import sys
from typing import Any

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from experiments import build, watch
from experiments.cli import for_people
from experiments.config import Config, VideoStage, load
from lightning_modules.monitor import LEVELS

STEP = "trainer/global_step"


def panels(config: Config, stage: str) -> list[Any]:
    """The panels of a stage, those first that are looked at first: does it learn, what does it make, is it fast."""
    part, seen = build.section(config, stage), stage not in ("clip", "prior")
    video, scored = isinstance(part, VideoStage), stage in watch.SCORED and part.trainer.validate_every > 0
    clips = video and (stage != "sr_high_video")  # SR_h sees frames of video as pictures
    where = "validation" if config.data.validation else "preview"

    def line(title: str, *keys: str, log_y: bool | None = None) -> wr.LinePlot:
        return wr.LinePlot(title=title, x=STEP, y=[f"{stage}/{key}" for key in keys], log_y=log_y)

    def media(title: str, key: str) -> wr.MediaBrowser:
        return wr.MediaBrowser(title=title, media_keys=[f"{stage}/{key}"], num_columns=1)

    found: list[Any] = [line("Loss", "loss", log_y=True)]
    if stage != "clip":
        levels = [f"loss/t{i}" for i in range(LEVELS)]
        found.append(line("Loss by noise level, t3 the noisiest", *levels, log_y=True))
    found.append(line("Loss of a fixed batch, at the start and the end", "probe"))
    if seen:
        found.append(media("Samples", "samples"))
    if clips:
        found.append(media("Clips", "clips"))
    if scored:
        found.append(media("At fixed prompts", "prompted"))
        if clips:
            found.append(media("Clips at fixed prompts", "prompted_clips"))
        found += [line(f"{name}, {where}", f"{where}/{name}") for name in watch.scores_of(config, stage)]
    found += [
        line("Gradient norm", "gradient_norm", log_y=True),
        line("Steps skipped, as a loss or gradient was not finite", "skipped_steps"),
        line("Learning rate", "learning_rate"),
        line("Samples a second", "time/samples_per_second"),
        line("TFLOP/s of a device", "time/tflops"),
        line("Share of the peak", "time/share_of_peak"),
        line("Seconds a step", "time/seconds_per_step"),
        line("Share of time waiting for data", "time/share_waiting_for_data"),
        line("Samples seen", "data/seen"),
        wr.LinePlot(title="Samples skipped, by cause", x=STEP, metric_regex=f"{stage}/data/skipped.*"),
        wr.LinePlot(title="Share left by filters, and what each took", x=STEP,
                    metric_regex=f"{stage}/data/(kept|filtered/.*)"),
    ]  # fmt: skip
    if video:
        found += [line("Frames a second, mean", "data/fps"), line("Frames a second, histogram", "data/rates")]
    if stage in ("clip", "prior"):
        found.append(line("Captions cut", "data/captions_cut"))
    return found


def workspace(config: Config, entity: str, project: str) -> ws.Workspace:
    """The workspace of a size: the runs of its stages, the latest first, a section for each stage."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Make-A-Video, {config.size}",
        sections=[
            ws.Section(
                name=f"{build.STAGES[stage].title} ({stage})",
                panels=panels(config, stage),
                is_open=True,
                layout_settings=ws.SectionLayoutSettings(columns=3, rows=3),
            )
            for stage in build.wanted(config)
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP),
    )


@for_people
def main(arguments: list[str]) -> None:
    if not arguments:
        raise ValueError("usage: python -m experiments.dashboard SIZE [key=value ...]")
    config = load(arguments[0], arguments[1:])
    made = workspace(config, "", os.environ.get("WANDB_PROJECT", watch.PROJECT))
    if not os.environ.get("WANDB_API_KEY"):
        raise ValueError(
            "WANDB_API_KEY is not set, and the dashboard is saved to your W&B project; "
            f"without an account `make report SIZE={config.page}` writes a page of the same curves."
        )
    made.entity = os.environ.get("WANDB_ENTITY") or wandb.Api().default_entity or ""
    print(made.save().url)


if __name__ == "__main__":
    main(sys.argv[1:])
