"""`python -m experiments.evaluate WHAT SIZE [key=value ...]`: generate clips and score them, beside published scores.

fvd, clipsim, fid, is   of any prompts and any real clips, `evaluate.prompts=` and `evaluate.clips=`; by default the
                        names in the CSV of data.clips, which no training reads. `evaluate.generated=` scores clips that
                        are there already.
ucf101, msrvtt          the paper's benchmarks; `evaluate.ucf101=` and `evaluate.msrvtt=` are the folders of the sets.

Samples are kept in `<runs>/<size>/evaluate/` (`experiments.sampling`); scores go to `WHAT.json` and `WHAT.md` there,
and to W&B. Under torchrun or SLURM all processes generate, and the first one scores.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datamodules.video_sources import Clip, list_clips
from experiments import build
from experiments.benchmarks import Task, folder_task, msrvtt, read_prompts, ucf101
from experiments.cli import for_people
from experiments.config import Config, load, save
from experiments.gallery import real_clips
from experiments.published import log_wandb, markdown, published
from experiments.sampling import OUTPUTS, generate, name, number_of, read_manifest
from experiments.scores import DISTANCES, check_listed, metrics_of, score
from experiments.train import quiet
from experiments.watch import PROJECT
from lightning_modules import parallel
from lightning_modules.whole import whole

SCORES = {  # what each command computes
    "fvd": ("fvd",),
    "clipsim": ("clipsim",),
    "fid": ("fid", "clip_fid"),
    "is": ("is",),
    "ucf101": ("fvd", "kvd", "is"),
    "msrvtt": ("fid", "clip_fid", "clipsim"),
}
# What both benchmarks are of: 16 x 256 x 256, the decoder's frames through SR_l^t.
FRAMES, RESOLUTION, PUBLISHED_OUTPUT = 16, 256, "upsampled"
BENCHMARKS: dict[str, Callable[[Config], Task]] = {"ucf101": ucf101, "msrvtt": msrvtt}


def evaluate(config: Config, what: str) -> dict[str, Any]:
    """Generate the samples that are missing and score them all; returns what is written to the JSON file.

    On ranks other than the first it returns {} once its samples are made.
    Raises ValueError and FileNotFoundError, in a sentence, for what cannot be evaluated.
    """
    if what not in SCORES:
        raise ValueError(f"there is no metric '{what}': it is one of {', '.join(SCORES)}.")
    settings, start, benchmark = config.evaluate, time.perf_counter(), what in BENCHMARKS
    if benchmark and settings.generated and not settings.setting:
        raise ValueError(
            "how were these clips made? evaluate.setting= says it in the table of the benchmark, as setting=zero-shot."
        )
    output = settings.output or (PUBLISHED_OUTPUT if benchmark else "decoded")
    if output not in OUTPUTS:
        raise ValueError(f"evaluate.output '{output}' is not one of {', '.join(OUTPUTS)}.")
    if benchmark:
        task = BENCHMARKS[what](config)
    else:
        task = folder_task(config, not settings.generated, any(each in DISTANCES for each in SCORES[what]))
    check_listed(config, task)
    # Before anything is generated: weights that are missing are told at once.
    metrics = metrics_of(config, SCORES[what]) if parallel.first_rank() else {}
    if settings.generated:
        made, texts = given(config, task, "clipsim" in SCORES[what])
        known = read_manifest(Path(settings.generated))
        kept = {"folder": settings.generated, "digest": known.get("digest", ""), "output": known.get("output", "")}
    else:
        folder = Path(settings.folder) if settings.folder else build.run_folder(config, "evaluate") / task.name
        digest, texts = generate(config, output, task.prompts, folder), task.prompts
        made = [Clip(name(k), str(folder / name(k))) for k in range(len(texts))]
        seeds = f"sample_seed({config.seed}, k) of sample k"
        kept = {"folder": str(folder), "digest": digest, "output": output, "seeds": seeds}
    if not parallel.first_rank():
        return {}
    if not settings.generated:
        with whole(folder / "real.json") as path:  # for the gallery
            path.write_text(json.dumps(task.beside or real_clips(config), indent=1))
    generating = time.perf_counter() - start
    result: dict[str, Any] = {"benchmark": what, "size": config.size, "seed": config.seed}
    result["setting"] = settings.setting or ("zero-shot" if benchmark else "")
    result |= score(config, metrics, made, texts, task)
    result["samples"] |= kept
    result["seconds"]["generating"] = round(generating, 2)
    result["notes"] = task.notes + (departures(task, result["samples"]) if benchmark else []) + result["notes"]
    result["published"] = published(what)
    write(config, result)
    return result


def departures(task: Task, samples: dict[str, Any]) -> list[str]:
    """Where the samples that were scored are not those of the benchmark, as notes."""
    told = []
    if samples["n"] != task.samples:
        told.append(f"{samples['n']:,} samples in place of {task.samples:,}")
    for key, published_one in (("frames", FRAMES), ("resolution", RESOLUTION)):
        if samples[key] != published_one:
            told.append(f"{key} {samples[key]} in place of {published_one}")
    if not samples["output"]:
        told.append("clips made elsewhere, of whose prompts and class shares nothing is known here")
    elif samples["output"] != PUBLISHED_OUTPUT:
        told.append(f"output {samples['output']} in place of {PUBLISHED_OUTPUT}")
    return told


def given(config: Config, task: Task, captioned: bool) -> tuple[list[Clip], list[str]]:
    """Clips that were generated before, in the order of their names, and if `captioned` a prompt for each.

    Prompts are those of evaluate.prompts, or of the benchmark, or of our manifest in the folder; of the latter two
    sample k is the file of that number. Raises ValueError where there are not as many.
    """
    root = config.evaluate.generated
    made, _ = list_clips(root)
    if not captioned:
        return made, []
    if config.evaluate.prompts:
        texts = read_prompts(Path(config.evaluate.prompts))
    else:
        known = task.prompts or read_manifest(Path(root)).get("prompts", [])
        texts = [known[k] for k in map(number_of, made) if k < len(known)]
    if len(texts) != len(made):
        raise ValueError(
            f"{root} has {len(made)} clips and there are {len(texts)} prompts for them: name a file with one for each "
            "clip in the order of their names, as in evaluate.prompts=file."
        )
    return made, texts


def write(config: Config, result: dict[str, Any]) -> None:
    """The result as WHAT.json and WHAT.md in the run folder, the config as WHAT.yaml, and the table to W&B."""
    folder = build.run_folder(config, "evaluate")
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(result, indent=2)), (".md", markdown(result))):
        with whole(folder / f"{result['benchmark']}{suffix}") as path:
            path.write_text(text)
    save(config, folder / f"{result['benchmark']}.yaml")
    log_wandb(result, folder, PROJECT)


@for_people
def main(arguments: list[str]) -> None:
    if len(arguments) < 2:
        raise ValueError(f"usage: python -m experiments.evaluate {'|'.join(SCORES)} SIZE [key=value ...]")
    what, size, *overrides = arguments
    quiet()
    config = load(size, overrides, section="evaluate")
    if result := evaluate(config, what):
        page = build.run_folder(config, "evaluate") / f"{what}.md"
        print(f"{markdown(result)}\n{result['waiting']:.1%} of scoring was waiting for data\n{page}")


if __name__ == "__main__":
    main(sys.argv[1:])
