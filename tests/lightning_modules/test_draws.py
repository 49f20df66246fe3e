"""A sample's noise is its own, however samples are grouped; and what the launchers tell of machines."""

import pytest
import torch

from datamodules.shards import Stream
from lightning_modules import parallel
from lightning_modules.draws import Draws

CPU = torch.device("cpu")


def drawn(seeds, n, shape=(3, 5)):
    draws = Draws({"seed": seeds}, n, CPU)
    like = torch.empty(n, *shape)
    return draws(torch.randint, 1000), draws.noise(like), draws(torch.rand), draws.noise(like)


@pytest.mark.parametrize("frames", [1, 3])
def test_how_samples_are_grouped_changes_nothing(frames):
    seeds = [5, 2**62, 7, 11]
    together = drawn(seeds, 4 * frames)
    halves = [drawn(seeds[i : i + 2], 2 * frames) for i in (0, 2)]
    for a, *parts in zip(together, *halves, strict=True):
        assert torch.equal(a, torch.cat(parts)) and len(a) == 4 * frames
        assert len(a.flatten(1).unique(dim=0) if a.ndim > 1 else a.unique()) == 4 * frames
    assert not torch.equal(together[1], together[3])


def test_the_draws_are_of_their_distributions():
    draws = Draws({"seed": list(range(2000))}, 2000, CPU)
    noise, times = draws.noise(torch.empty(2000, 20)), draws(torch.randint, 10)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert times.min() == 0 and times.max() == 9 and abs(times.float().mean() - 4.5) < 0.3


def test_without_seeds_the_global_generator_decides():
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(Draws({}, 3, CPU).noise(torch.empty(3, 4)))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_every_position_has_a_seed():
    class Numbers:
        def __len__(self):
            return 3

        def load(self, index, position, rng):
            return {"index": index}

    seeds = [[Stream(Numbers(), seed)[position]["seed"] for position in range(50)] for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] and len(set(seeds[0] + seeds[2])) == 100  # over epochs, too


def test_machines_are_counted_by_their_launcher(monkeypatch):
    assert parallel.nodes() == 1
    with monkeypatch.context() as slurm:
        slurm.setenv("SLURM_NTASKS", "16")
        slurm.setenv("SLURM_NNODES", "2")
        slurm.setenv("SLURM_JOB_NAME", "prior")
        assert parallel.nodes() == 2
    torchrun = dict(RANK=9, GROUP_RANK=1, LOCAL_RANK=1, WORLD_SIZE=32, LOCAL_WORLD_SIZE=8, TORCHELASTIC_RUN_ID="a")
    for key, value in torchrun.items():
        monkeypatch.setenv(key, str(value))
    assert parallel.nodes() == 4


def test_fsdp_names_its_precisions():
    assert parallel.strategy("ddp", "16-mixed") == "ddp"
    with pytest.raises(ValueError, match="32-true or bf16-mixed, not in 16-mixed"):
        parallel.strategy("fsdp", "16-mixed")
