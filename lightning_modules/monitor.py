"""What a person watches while a stage trains: the loss by noise level, and where the time goes."""

import time
from functools import cache
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor

# Dense bf16 TFLOP/s of the vendors' data sheets; the first name that is in the device's own counts.
PEAKS = {
    "GB200": 2500.0, "B200": 2250.0, "H200": 989.4, "H100 PCIe": 756.0, "H100 NVL": 835.5, "H100": 989.4, "H800": 989.4,
    "A100": 311.9, "A800": 311.9, "L40S": 362.0, "L40": 181.0, "L4": 121.0, "A40": 149.7, "A30": 165.0, "A10": 125.0,
    "RTX 4090": 165.2, "RTX 3090": 71.0, "MI300X": 1307.4, "MI250X": 191.5,
}  # fmt: skip
LEVELS = 4


class Clock(PassThroughProfiler):
    """Seconds that training has waited for data, and those it stood still for pictures, scores and checkpoints.

    Lightning tells its profiler when each part of a step begins and ends.
    """

    PAUSES = ("Samples", "Validation", "Checkpoint")

    def __init__(self) -> None:
        super().__init__()
        self.waited = self.paused = self.begin = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next") or self.is_pause(action_name):
            self.begin = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.waited += time.perf_counter() - self.begin
        elif self.is_pause(action_name):
            self.paused += time.perf_counter() - self.begin

    def is_pause(self, action_name: str) -> bool:
        return action_name.endswith("on_train_batch_end") and any(name in action_name for name in self.PAUSES)


class Speed(L.Callback):
    """Logs samples a second, FLOP/s and their share of the peak, and the share of time spent waiting for data.

    Over the steps since the last row; pauses for pictures, scores and checkpoints do not count, nor does the first
    step, which compiles and warms up. A measured peak is of matrix products, which Winograd convolution can pass. All
    are `time/...`: no two runs have the same. Also the learning rate, and how many samples all ranks have seen.

    Args:
        flops: of a step of one rank.
        peak: TFLOP/s of one device, 0 = see `peak_tflops`.
    """

    def __init__(self, flops: int, peak: float, clock: Clock):
        self.flops, self.peak, self.clock = flops, peak, clock
        self.mark: tuple[int, float, float] | None = None  # steps, time, seconds waited

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        pl_module.log("learning_rate", optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.mark is None:
            self.mark = self.now(pl_module.device, step)
        if not row_is_due(trainer, batch_idx):
            return
        pl_module.log("data/seen", float(trainer.datamodule.consumed))  # type: ignore[attr-defined]
        mark, self.mark = self.mark, self.now(pl_module.device, step)
        steps, seconds, waited = (new - old for new, old in zip(self.mark, mark, strict=True))
        if not steps:
            return
        if not self.peak:
            self.peak = peak_tflops(pl_module.device, trainer.precision)
        tflops = self.flops * steps / seconds / 1e12
        samples = trainer.datamodule.batch_size * trainer.accumulate_grad_batches * trainer.world_size  # type: ignore[attr-defined]
        values = {
            "seconds_per_step": seconds / steps,
            "samples_per_second": samples * steps / seconds,
            "tflops": tflops,
            "share_of_peak": tflops / self.peak,
            "share_waiting_for_data": waited / seconds,
        }
        pl_module.log_dict({f"time/{k}": v for k, v in values.items()})

    def now(self, device: torch.device, step: int) -> tuple[int, float, float]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return step, time.perf_counter() - self.clock.paused, self.clock.waited


class NoiseLevels(L.Callback):
    """Logs the loss by noise level: `loss/t0` ... `loss/t3` are the quarters of diffusion time, the last is noisiest.

    Each is the mean over the samples of all ranks since the last row, so that small batches fill all four; where there
    were none, it is the last mean. All of it is in the checkpoint: a resumed run logs what the uninterrupted one would.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(2, LEVELS, dtype=torch.float64)  # of losses, and their number
        self.means: dict[str, float] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        diffusion: Any = getattr(pl_module, "diffusion", None)
        if diffusion is None:
            return
        self.sums = self.sums.to(pl_module.device)

        def add(t: Tensor, losses: Tensor) -> None:
            if not pl_module.training:
                return
            new = torch.zeros_like(self.sums)
            level = t * LEVELS // diffusion.config.steps
            new[0].index_add_(0, level, losses.double())
            new[1].index_add_(0, level, torch.ones_like(losses, dtype=torch.float64))
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(new)
            self.sums += new

        diffusion.on_loss = add

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not row_is_due(trainer, batch_idx):
            return
        self.means |= {f"loss/t{level}": total / n for level, (total, n) in enumerate(self.sums.T.tolist()) if n}
        pl_module.log_dict(self.means)
        self.sums.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums.clone(), "means": dict(self.means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.means = state["sums"].to(self.sums.device), dict(state["means"])


def row_is_due(trainer: L.Trainer, batch_idx: int) -> bool:
    """Does Lightning log this batch? It is the last of a step, and the step one of every `log_every_n_steps`."""
    whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return whole and trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


def peak_tflops(device: torch.device, precision: str) -> float:
    """The most TFLOP/s that a device can do: in bf16 by its name where it is known, else of a large matrix product."""
    half = "16" in str(precision)
    if half and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():
            if known in name:
                return peak
    return measured_tflops(device, torch.bfloat16 if half else torch.float32)


@cache
def measured_tflops(device: torch.device, dtype: torch.dtype, side: int = 0, times: int = 3) -> float:
    """TFLOP/s of the fastest of some products of two matrices `side side`."""
    side = side or (8192 if device.type == "cuda" else 2048)
    a = torch.ones(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(times + 1):  # the first is slow
        begin = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * side**3 / min(seconds) / 1e12
