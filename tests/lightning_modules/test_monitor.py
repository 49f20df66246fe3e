"""What is logged of a training: means by noise level by hand, and where time went, against the clock."""

import time

import lightning as L
import pytest
import torch
from torch import nn

from lightning_modules.callbacks import StepSeed
from lightning_modules.monitor import Clock, NoiseLevels, Speed, measured_tflops, peak_tflops
from models.diffusion import Diffusion, DiffusionConfig


class Noisy(L.LightningModule):
    """Losses that are known: of a sample at diffusion time t, with x0 = 0 and a network that says `t`."""

    def __init__(self, seconds=0.0):
        super().__init__()
        self.net, self.seconds = nn.Linear(1, 1), seconds
        self.diffusion = Diffusion(DiffusionConfig(steps=100, prediction="x0"))
        self.seen = []

    def training_step(self, batch, batch_idx):
        time.sleep(self.seconds)
        t = torch.randint(100, (3,))
        self.seen.append(t)
        x0 = torch.zeros(3, 1)
        losses = self.diffusion.loss(t.view(3, 1).float(), x0, x0, t, x0)
        return losses.mean() + 0 * self.net(x0).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.25)


class Rows(L.Callback):
    """The rows that Lightning logs, by step."""

    def __init__(self):
        self.rows = {}

    def on_train_batch_start(self, trainer, *_):
        self.take(trainer)

    def on_train_end(self, trainer, *_):
        self.take(trainer)

    def take(self, trainer):
        if trainer.global_step and trainer.global_step % trainer.log_every_n_steps == 0:
            self.rows[trainer.global_step] = {k: float(v) for k, v in trainer.logged_metrics.items()}


class Data(L.LightningDataModule):
    """Endless batches of two, each after some seconds."""

    def __init__(self, seconds=0.0, batches=None):
        super().__init__()
        self.seconds, self.batch_size, self.consumed = seconds, 2, 0
        self.batches = batches or [{}]
        self.skipped, self.filtered, self.rates = ({} for _ in range(3))

    def train_dataloader(self):
        return Slow(self)


class Slow:
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        while True:
            for batch in self.data.batches:
                time.sleep(self.data.seconds)
                yield {"x": torch.zeros(1), **batch}


def fit(module, data, *callbacks, steps=4, clock=None, ckpt_path=None, **options):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, profiler=clock, **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path, **({"weights_only": True} if ckpt_path else {}))
    return trainer


def by_hand(times):
    """The mean of t^2 in each quarter of time."""
    t = torch.cat(times)
    return {f"loss/t{i}": (t[t // 25 == i].double() ** 2).mean().item() for i in range(4) if (t // 25 == i).any()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_by_noise_level_by_hand(accumulate):
    module, rows = Noisy(), Rows()
    options = dict(log_every_n_steps=4, accumulate_grad_batches=accumulate)
    fit(module, Data(), StepSeed(3), NoiseLevels(), rows, steps=8, **options)
    half = 4 * accumulate
    assert set(by_hand(module.seen[:half])) == {"loss/t0", "loss/t1", "loss/t2", "loss/t3"}
    for step, times in ((4, module.seen[:half]), (8, module.seen[half:])):  # the mean begins anew after a row
        got = {k: v for k, v in rows.rows[step].items() if k.startswith("loss/t")}
        for key, value in by_hand(times).items():
            assert got[key] == pytest.approx(value)


def test_what_is_measured_on_the_side_does_not_count():
    module, levels = Noisy(), NoiseLevels()
    fit(module, Data(), levels, steps=1, log_every_n_steps=50)
    before = levels.sums.clone()
    module.eval()
    module.diffusion.loss(*(torch.ones(3, 1) for _ in range(3)), torch.arange(3), torch.ones(3, 1))
    assert torch.equal(levels.sums, before) and before[1].sum() == 3


def test_a_restart_in_the_middle_logs_the_same_levels(tmp_path):
    found = []
    for stops in ((6,), (4, 6)):  # a row every three steps: the restart comes one step into the second
        for i, steps in enumerate(stops):
            rows = Rows()
            path = tmp_path / "a.ckpt" if i else None
            trainer = fit(Noisy(), Data(), StepSeed(1), NoiseLevels(), rows, steps=steps, ckpt_path=path,
                          log_every_n_steps=3)  # fmt: skip
            trainer.save_checkpoint(tmp_path / "a.ckpt")
        found.append(rows.rows[6])
    assert found[0] == found[1] and len([k for k in found[0] if k.startswith("loss/t")]) >= 3


def test_time_goes_where_it_goes():
    """A loader of 40 ms and a step of 20: two thirds of the time are waited for data."""
    clock, rows = Clock(), Rows()
    speed = Speed(flops=10**9, peak=0.1, clock=clock)
    data = Data(seconds=0.04)
    fit(Noisy(seconds=0.02), data, speed, rows, steps=9, clock=clock, log_every_n_steps=3)
    assert "time/tflops" in rows.rows[3]  # the first step is left out, two are measured
    row = rows.rows[9]
    assert 0.06 <= row["time/seconds_per_step"] < 0.09
    assert row["time/samples_per_second"] == pytest.approx(2 / row["time/seconds_per_step"])
    assert row["time/tflops"] == pytest.approx(1e-3 / row["time/seconds_per_step"])
    assert row["time/share_of_peak"] == pytest.approx(row["time/tflops"] / 0.1)
    assert 0.5 < row["time/share_waiting_for_data"] < 0.72
    assert row["learning_rate"] == 0.25


def test_pictures_are_a_pause_not_work():
    class Samples(L.Callback):
        def on_train_batch_end(self, *_):
            time.sleep(0.2)

    clock, rows = Clock(), Rows()
    fit(Noisy(seconds=0.01), Data(), Speed(1, 1.0, clock), Samples(), rows, steps=4, clock=clock, log_every_n_steps=2)
    assert 0.01 <= rows.rows[4]["time/seconds_per_step"] < 0.1


def test_peaks_are_known_by_name_and_measured_where_not(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert peak_tflops(cpu, "32-true") == measured_tflops(cpu, torch.float32)
    assert 0.001 < measured_tflops(cpu, torch.float32) < 50
    for name, peak in (("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 311.9),
                       ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA GB200", 2500)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_tflops(gpu, "bf16-mixed") == peak
