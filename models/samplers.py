"""Samplers: pure functions (denoise, noise, times) -> x0, and the noise they start from.

`denoise(z, t)` returns the clean sample and, from a network that learns it, the variance fraction (else None).
Guidance, masks, conditions and progress bars wrap `denoise`; shared noise is made by whoever makes `noise`. A
sampler learns of none of them. `draw()` returns fresh noise of z's shape.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.diffusion import Times, interpolated_log_variance, posterior

Denoise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
Draw = Callable[[], Tensor]


def ddpm(denoise: Denoise, z: Tensor, times: Times, draw: Draw) -> Tensor:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2), with the learned variance where there is one."""
    for i, t in enumerate(times.t):
        x0, fraction = denoise(z, t.expand(len(z)))
        mean, small, beta = posterior(x0, z, times.alpha[i], times.sigma[i], times.alpha[i + 1], times.sigma[i + 1])
        if i == len(times.t) - 1:
            return x0
        if fraction is None:
            deviation = small.sqrt()
        else:
            deviation = (0.5 * interpolated_log_variance(fraction, small, beta)).exp()
        z = mean + deviation * draw()
    return z


def ddim(denoise: Denoise, z: Tensor, times: Times, draw: Draw, eta: float = 0.0) -> Tensor:
    """DDIM (arXiv 2010.02502, eq. 12), deterministic at eta = 0."""
    for i, t in enumerate(times.t):
        alpha, sigma, alpha_s, sigma_s = times.alpha[i], times.sigma[i], times.alpha[i + 1], times.sigma[i + 1]
        x0, _ = denoise(z, t.expand(len(z)))
        eps = (z - alpha * x0) / sigma
        fresh = eta * (sigma_s / sigma) * (1 - (alpha / alpha_s).square()).sqrt()
        z = alpha_s * x0 + (sigma_s.square() - fresh.square()).clamp(min=0).sqrt() * eps
        if eta:
            z = z + fresh * draw()
    return z


def dpmpp_2m(denoise: Denoise, z: Tensor, times: Times, draw: Draw) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2); first order at both ends."""
    log_snr = times.alpha.log() - times.sigma.log()  # lambda
    last, previous = len(times.t) - 1, None
    for i, t in enumerate(times.t):
        x0, _ = denoise(z, t.expand(len(z)))
        direction = x0
        if previous is not None and i < last:
            # h / (2 h_prev); 0 after a first step from pure noise, whose lambda is -infinity
            lean = (log_snr[i + 1] - log_snr[i]) / (2 * (log_snr[i] - log_snr[i - 1]))
            direction = x0 + lean * (x0 - previous)
        shrink = times.alpha[i] * times.sigma[i + 1] / times.sigma[i]  # alpha_i e^{-h}, finite at both ends
        z = times.sigma[i + 1] / times.sigma[i] * z + (times.alpha[i + 1] - shrink) * direction
        previous = x0
    return z


SAMPLERS: dict[str, Callable[[Denoise, Tensor, Times, Draw], Tensor]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
}


def guided(denoise: Denoise, unconditional: Denoise, scale: float, rescale: float = 0.0) -> Denoise:
    """Classifier-free guidance (arXiv 2207.12598) on the clean sample: x_u + w (x_c - x_u); w = 1 is none.

    Guidance widens the range of a sample. `rescale` in [0, 1] is the share of it that is taken back, by giving the
    sample the deviation of x_c (arXiv 2305.08891, eqs. 14 to 16 and 0.7 there, where x is the network's output).
    """
    if scale == 1:
        return denoise

    def in_turn(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        (with_it, fraction), (without, _) = denoise(z, t), unconditional(z, t)
        return combined(with_it, without, scale, rescale), fraction

    return in_turn


def guided_at_once(both: Denoise, scale: float, rescale: float = 0.0) -> Denoise:
    """As `guided` in one call of a denoiser of twice the batch: the first half with the condition, the second without.

    The same to rounding. A GPU that one batch does not fill does both in the time of one.
    """

    def at_once(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        x0, fraction = both(torch.cat((z, z)), torch.cat((t, t)))
        with_it, without = x0.chunk(2)
        return combined(with_it, without, scale, rescale), None if fraction is None else fraction.chunk(2)[0]

    return at_once


def combined(with_it: Tensor, without: Tensor, scale: float, rescale: float) -> Tensor:
    """Predictions with and without the condition as one (`guided`)."""
    x0 = without + scale * (with_it - without)
    if rescale:
        wanted, found = (x.flatten(1).std(1).view(-1, *[1] * (x.ndim - 1)) for x in (with_it, x0))
        x0 = x0 * (1 - rescale + rescale * wanted / found.clamp(min=1e-8))
    return x0


def clipped(denoise: Denoise) -> Denoise:
    """Clean samples clipped to the range of pixels, [-1, 1]."""

    def clip(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        x0, fraction = denoise(z, t)
        return x0.clamp(-1, 1), fraction

    return clip


def seeded_draw(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str) -> Draw:
    """A source of Gaussian noise `(len(seeds), *shape)` with one generator for each sample.

    Sample k depends on its own seed alone, not on the batch it is in, nor on the device.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw() -> Tensor:
        return torch.stack([torch.randn(*shape, generator=g) for g in generators]).to(device)

    return draw


def shared_over_frames(draw: Draw, frames: int) -> Draw:
    """The same noise `b c h w` for every frame of a clip: `b c f h w` (paper, section 3.2, SR_h)."""
    return lambda: draw().unsqueeze(2).expand(-1, -1, frames, -1, -1)
