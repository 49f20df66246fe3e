"""`python -m experiments.demo SIZE "a sentence" [key=value ...]`: train every stage, then make a film.

Stages that have finished are skipped and an interrupted one goes on, so the same command always continues.
"""

import sys
import time

from experiments import build
from experiments.cli import for_people
from experiments.config import Config, load
from experiments.generate import generate, peak_memory
from experiments.train import quiet, train

PROMPT = "a 3D emoji of octopus"


def train_all(config: Config) -> None:
    """Train the stages of a config that have not finished, in order."""
    for stage in build.wanted(config):
        if build.finished(config, stage):
            print(f"{build.STAGES[stage].title}: finished before, skipped")
        else:
            train(config, stage)


def table(config: Config) -> str:
    """The finished stages: parameters, steps, seconds, first and last loss."""
    lines = [f"{'stage':<14}{'parameters':>12}{'steps':>8}{'seconds':>9}{'first loss':>12}{'last loss':>11}"]
    total = 0.0
    for stage in build.wanted(config):
        result = build.summary(config, stage)
        if result is None:
            continue
        total += result["seconds"]
        lines.append(
            f"{build.STAGES[stage].title:<14}{result['parameters'] / 1e6:>10.2f} M{result['steps']:>8}"
            f"{result['seconds']:>9.0f}{result['first_loss']:>12.4f}{result['last_loss']:>11.4f}"
        )
    return "\n".join([*lines, f"{'in all':<34}{total:>9.0f}"])


@for_people
def main(arguments: list[str]) -> None:
    size, prompt = (arguments + ["tiny", PROMPT][len(arguments) :])[:2]
    config = load(size, arguments[2:])
    quiet()
    start = time.time()
    if not prompt.strip():
        raise ValueError("the prompt is empty: say what the film should show.")
    train_all(config)
    path, sheet = generate(config, prompt)
    print(f"\n{table(config)}\n\nfilm           {path}\ncontact sheet  {sheet}\n"
          f"this sitting took {time.time() - start:.0f} s and at most {peak_memory():.1f} GiB")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
