"""The random numbers of a training step, drawn sample by sample."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Draws:
    """Times, noise and flags of a batch, those of each sample from a generator of its own.

    The data module gives every sample a seed, a function of its position in the stream. So a sample has the same noise
    however the stream is cut into batches, accumulation and ranks. Where a batch brings no seeds, as a fixed preview,
    they are drawn from the global generator.

    Args:
        n: rows of the batch, an equal number for each sample: more than one where frames are seen as images.
    """

    def __init__(self, batch: dict[str, Any], n: int, device: torch.device):
        seeds = batch.get("seed") or torch.randint(2**63 - 1, (n,)).tolist()
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.each, self.device = n // len(seeds), device

    def __call__(self, draw: Callable[..., Tensor], *args: Any) -> Tensor:
        """A small draw for each row, `(n,)`: of torch.rand, or of torch.randint and its limit."""
        drawn = [draw(*args, (self.each,), generator=generator) for generator in self.generators]
        return torch.cat(drawn).to(self.device)

    def noise(self, like: Tensor) -> Tensor:
        """Normal noise of the shape of `like`, made on the device."""
        noise, on_device = torch.empty(like.shape, device=self.device), torch.Generator(self.device)
        for rows, generator in zip(noise.split(self.each), self.generators, strict=True):
            rows.normal_(generator=on_device.manual_seed(int(torch.randint(2**63 - 1, (), generator=generator))))
        return noise
