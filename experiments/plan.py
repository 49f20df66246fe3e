"""`python -m experiments.plan SIZE [gpus=64 ...] [key=value ...]`: what a size takes, before a cluster is reserved.

For every stage: memory of a GPU under each strategy by its parts, what fits and the largest batch that does, work, and
at a stated utilisation and price, time and dollars. Nothing is trained and no GPU is needed.
"""

import difflib
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import build
from experiments.cli import for_people
from experiments.config import Config, VideoStage, first_line, load
from experiments.memory import GIB, STRATEGIES, Step, bounds, measured, step

PARTS = {"weights": "weights", "copies": "copies", "gradients": "gradients", "adamw": "AdamW", "ema": "EMA",
         "clip": "CLIP", "activations": "activations", "peak": "peak"}  # fmt: skip


@dataclass
class Plan:
    """What is planned for; the defaults are of an H100 of 80 GB, in machines of eight."""

    gpus: int = 8  # in all
    machine: int = 8  # GPUs of one machine, over which FSDP2 splits
    memory: float = 80.0  # GiB of a GPU
    spare: float = 0.1  # share of it for what is not a tensor: CUDA, cuDNN, NCCL, holes
    peak: float = 989.0  # bf16 TFLOP/s of a GPU
    utilisation: float = 0.4  # share of it that is reached
    price: float = 2.5  # dollars for an hour of a GPU
    measure: int = 0  # also run a step of so many samples of every stage on this machine, and compare

    @property
    def limit(self) -> float:
        """Bytes that tensors may take."""
        return (1 - self.spare) * self.memory * GIB

    @property
    def strategies(self) -> tuple[str, ...]:
        return STRATEGIES if self.gpus > 1 else STRATEGIES[:1]

    @property
    def shards(self) -> int:
        return min(self.gpus, self.machine)


@dataclass(frozen=True)
class Cost:
    """What a stage takes from its first step to its last."""

    samples: float  # a second, over all GPUs
    hours: float
    gpu_hours: float
    dollars: float


def cost(config: Config, stage: str, traced: Step, plan: Plan) -> Cost:
    """Time and dollars of a stage. A step takes batch_size x accumulate x GPUs samples."""
    samples = plan.gpus * plan.utilisation * plan.peak * 1e12 / (traced.flops + traced.clip_flops)
    hours = build.section(config, stage).trainer.max_steps * global_batch(config, stage, plan.gpus) / samples / 3600
    return Cost(samples, hours, hours * plan.gpus, hours * plan.gpus * plan.price)


def global_batch(config: Config, stage: str, gpus: int) -> int:
    """Samples of a step."""
    trainer = build.section(config, stage).trainer
    return trainer.batch_size * trainer.accumulate * gpus


def block(config: Config, stage: str, traced: Step, plan: Plan) -> str:
    """A stage, as text."""
    part = build.section(config, stage)
    trainer, spent = part.trainer, cost(config, stage, traced, plan)
    trained = "" if traced.trained == traced.parameters else f", {count(traced.trained)} of them trained"
    clip = f" and the frozen CLIP's {count(traced.clip_parameters)}" if traced.clip_parameters else ""
    lines = [
        f"{build.STAGES[stage].title}: make {build.STAGES[stage].command} SIZE={config.page}",
        f"  {count(traced.parameters)} parameters{trained}{clip}; a sample is {sample(config, stage)}: "
        f"{flops(traced.flops + traced.clip_flops)}",
        f"  a step is batch_size {trainer.batch_size} x accumulate {trainer.accumulate} x {plan.gpus} GPUs = "
        f"{global_batch(config, stage, plan.gpus)} samples: "
        f"{flops((traced.flops + traced.clip_flops) * global_batch(config, stage, plan.gpus))}",
        f"  {'GiB per GPU':<14}"
        + "".join(f"{name:>{width(name)}}" for name in PARTS.values())
        + f"{'':11}  largest batch",
    ]
    for strategy in plan.strategies:
        args = (strategy, plan.shards, trainer.accumulate)
        parts, largest = traced.parts(trainer.batch_size, *args), traced.largest_batch(plan.limit, *args)
        name = f"FSDP2 over {plan.shards}" if strategy == "FSDP2" else strategy
        lines.append(
            f"  {name:<14}"
            + "".join(f"{getattr(parts, part) / GIB:{width(title)}.2f}" for part, title in PARTS.items())
            + f"{'fits' if parts.peak <= plan.limit else 'too large':>11}{largest or 'none':>15}"
        )
    lines.append(
        f"  {trainer.max_steps:,} steps at {spent.samples:,.1f} samples/s: {duration(spent.hours)}, "
        f"{spent.gpu_hours:,.1f} GPU hours, ${spent.dollars:,.0f}"
    )
    return "\n".join(lines)


def width(title: str) -> int:
    """Of a column."""
    return max(9, len(title) + 2)


def sample(config: Config, stage: str) -> str:
    """What a stage counts as one sample."""
    if stage in ("clip", "prior"):
        return "a captioned image" if not config.data.embeddings or stage == "clip" else "a pair of embeddings"
    part = build.section(config, stage)
    side = build.super_resolution(config, stage).crop if stage.startswith("sr_") else config.decoder.size
    return f"{f'{part.frames} frames' if isinstance(part, VideoStage) else 'an image'} of {side} x {side}"


def whole(config: Config, traced: dict[str, Step], plan: Plan) -> str:
    """The cascade in one table, and what it comes to."""
    lines = [
        f"{'in all':<14}{'parameters':>11}{'samples/s':>12}{'time':>14}{'GPU hours':>12}{'dollars':>12}  fits with"
    ]
    total = Cost(0, 0, 0, 0)
    for stage, one in traced.items():
        spent, trainer = cost(config, stage, one, plan), build.section(config, stage).trainer
        total = Cost(0, *(getattr(total, f) + getattr(spent, f) for f in ("hours", "gpu_hours", "dollars")))
        fitting = [
            s for s in plan.strategies
            if one.parts(trainer.batch_size, s, plan.shards, trainer.accumulate).peak <= plan.limit
        ]  # fmt: skip
        best = max((one.largest_batch(plan.limit, s, plan.shards, trainer.accumulate), s) for s in plan.strategies)
        advice = ", ".join(fitting) or (f"batch_size {best[0]} and {best[1]}" if best[0] else "nothing here")
        lines.append(
            f"{build.STAGES[stage].title:<14}{count(one.parameters):>11}{spent.samples:12,.1f}"
            f"{duration(spent.hours):>14}{spent.gpu_hours:12,.1f}{spent.dollars:12,.0f}  {advice}"
        )
    lines.append(f"{'':<37}{duration(total.hours):>14}{total.gpu_hours:12,.1f}{total.dollars:12,.0f}")
    return "\n".join(lines)


def head(size: str, plan: Plan) -> str:
    """What is planned for, and how to read the tables."""
    return (
        f"{size} on {plan.gpus} GPUs of {plan.memory:g} GiB, {plan.limit / GIB:g} of them for tensors; "
        f"{plan.utilisation:.0%} of {plan.peak:g} TFLOP/s; ${plan.price:.2f} for a GPU hour\n"
        "Memory is that of batch_size. Copies are weights in bf16, under FSDP2 what it gathers; DDP has gradients\n"
        "twice. The peak is the most at one time: less than the sum, as gradients come while activations go."
    )


def count(n: float) -> str:
    """Parameters, short."""
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.3g} M"


def flops(n: float) -> str:
    """Operations, short."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n / 1e9:.3g} GFLOP"


def duration(hours: float) -> str:
    """Time, in the unit that suits it."""
    for unit, size in (("days", 24), ("hours", 1), ("minutes", 1 / 60)):
        if hours >= 2 * size:
            return f"{hours / size:.3g} {unit}"
    return f"{3600 * hours:.2g} seconds"


def warn(config: Config, stage: str) -> None:
    """Say on standard error, before a stage trains, that its step will not fit in the memory there is.

    On a GPU that is its memory but a tenth, on a CPU what is available now, shared by the machine's ranks.
    Never stops a run. Takes a moment where it is clear without a trace that a step fits, or that it cannot.
    """
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", 0)))):
        return
    try:
        sentence = will_not_fit(config, stage)
    except Exception as error:  # noqa: BLE001 - a plan that cannot be made is no reason not to train
        sentence = f"the memory of a step could not be computed: {type(error).__name__}: {error}"
    if sentence:
        print(f"warning: {sentence}", file=sys.stderr, flush=True)


def will_not_fit(config: Config, stage: str) -> str:
    """The warning, empty where a step fits."""
    trainer = build.section(config, stage).trainer
    device = "cuda" if torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda") else "cpu"
    ranks = local_ranks(trainer.devices, device)
    several = max(ranks, int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1)))) > 1
    strategy = "FSDP2" if "fsdp" in trainer.strategy else "DDP" if several else "one GPU"
    limit = (1 - Plan.spare) * device_memory() if device == "cuda" else available_memory() / ranks
    least, most = bounds(config, stage, strategy, ranks)
    if most <= limit:
        return ""
    where = "of a GPU's memory" if device == "cuda" else "of memory for each process"
    need = f"{least / GIB:.1f} GiB or more, before activations"
    if least <= limit:
        peak = step(config, stage, device, trainer.batch_size).parts(
            trainer.batch_size, strategy, ranks, trainer.accumulate
        ).peak  # fmt: skip
        if peak <= limit:
            return ""
        need = f"{peak / GIB:.1f} GiB"
    return (
        f"{build.STAGES[stage].title} will not fit: a step of trainer.batch_size={trainer.batch_size} takes {need}, "
        f"and there are {limit / GIB:.1f} GiB {where}. `make plan SIZE={config.page}` shows what would."
    )


def device_memory() -> int:
    """Bytes of a GPU."""
    return torch.cuda.get_device_properties(0).total_memory


def available_memory() -> int:
    """Bytes that a process can take without swapping; where the system does not tell, all of its memory."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        return 1024 * int(meminfo.read_text().split("MemAvailable:")[1].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def local_ranks(devices: str, device: str) -> int:
    """Processes that train on this machine."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    if devices in ("auto", "-1"):
        return max(1, torch.cuda.device_count()) if device == "cuda" else 1
    return int(devices) if devices.isdigit() else max(1, len(devices.strip("[], ").split(",")))


def compared(config: Config, stage: str, batch: int) -> str:
    """A step of this stage on this machine, computed and measured."""
    device = build.device().split(":")[0]
    computed = step(config, stage, device).parts(batch).peak
    found = measured(config, stage, batch, device)
    return (
        f"  measured here ({device}, {batch} samples): {found / GIB:.3f} GiB, computed {computed / GIB:.3f}, "
        f"{computed / found - 1:+.1%}"
    )


def read(size: str, arguments: list[str]) -> tuple[Plan, Config]:
    """The plan's settings and the page's, told apart by their keys."""
    names = [f.name for f in fields(Plan)]
    own = [a for a in arguments if a.partition("=")[0] in names]
    for key in [a.partition("=")[0] for a in arguments if a not in own]:
        if "." not in key and (near := difflib.get_close_matches(key, names, n=1, cutoff=0.7)):
            raise ValueError(f"there is no key '{key}'; did you mean '{near[0]}'?")
    try:
        plan = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Plan), OmegaConf.from_dotlist(own)))
    except OmegaConfBaseException as error:
        raise ValueError(first_line(error)) from None
    assert isinstance(plan, Plan)
    wrong = [f for f in ("gpus", "machine", "memory", "peak", "utilisation") if getattr(plan, f) <= 0]
    if wrong or not 0 <= plan.spare < 1:
        raise ValueError(f"{wrong[0]} must be more than 0." if wrong else "spare is a share of the memory, below 1.")
    return plan, load(size, [a for a in arguments if a not in own])


@for_people
def main(arguments: list[str]) -> None:
    if not arguments:
        raise ValueError("usage: python -m experiments.plan SIZE [gpus=64 ...] [key=value ...]")
    plan, config = read(arguments[0], arguments[1:])
    print(head(config.page, plan))
    traced = {}
    for stage in build.wanted(config):
        traced[stage] = step(config, stage)
        print(f"\n{block(config, stage, traced[stage], plan)}", flush=True)
        if plan.measure:
            print(compared(config, stage, plan.measure), flush=True)
    print(f"\n{whole(config, traced, plan)}")


if __name__ == "__main__":
    main(sys.argv[1:])
