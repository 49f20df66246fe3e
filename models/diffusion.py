"""Noise schedules, q(z_t | x_0), what the network predicts, and the losses.

Throughout: z = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1 (variance preserving), t = 0 ... steps-1, and
abar_t = alpha_t^2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class DiffusionConfig:
    """The diffusion process of one stage. The defaults are the paper's (hybrid loss, noise prediction)."""

    steps: int = 1000
    schedule: str = "cosine"  # cosine (arXiv 2102.09672) | linear (arXiv 2006.11239)
    prediction: str = "eps"  # eps | x0 | v (arXiv 2202.00512)
    zero_terminal_snr: bool = False  # rescale so that the last step is pure noise; needs x0 or v (arXiv 2305.08891)
    min_snr_gamma: float = 0.0  # weight the loss by min(SNR, gamma), 5 in arXiv 2303.09556; 0 = off
    vlb_weight: float = 0.001  # of the bound term that trains a learned variance (arXiv 2102.09672, eq. 16)


class Times(NamedTuple):
    """Where a sampler stops: `t` (n,) and the (n+1,) alphas and sigmas, which end at 1 and 0, the clean sample."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor


class Diffusion:
    """The forward process of a `DiffusionConfig` and the losses of a network that inverts it.

    Raises:
        ValueError: an unknown schedule or prediction, or zero terminal SNR with eps, which it cannot train.
    """

    def __init__(self, config: DiffusionConfig):
        if config.prediction not in ("eps", "x0", "v"):
            raise ValueError(f"prediction '{config.prediction}' is not one of eps, x0, v.")
        if config.zero_terminal_snr and config.prediction == "eps":
            raise ValueError("zero_terminal_snr needs prediction=v or x0: noise alone says nothing of eps.")
        self.config = config
        abar = alphas_cumprod(config.schedule, config.steps)
        if config.zero_terminal_snr:
            root = abar.sqrt()
            abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        self.abar = abar  # float64 on the CPU: small, and exact at both ends
        self.on_loss: Callable[[Tensor, Tensor], None] | None = None  # called with t and the losses of a batch

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), shaped to multiply `like`, in float32."""
        abar = self.abar.to(like.device, torch.float64 if like.device.type != "mps" else torch.float32)[t]
        shape = (-1, *[1] * (like.ndim - 1))
        return abar.sqrt().float().view(shape), (1 - abar).sqrt().float().view(shape)

    def noised(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """z_t of q(z_t | x0)."""
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network is asked to predict."""
        if self.config.prediction == "eps":
            return eps
        if self.config.prediction == "x0":
            return x0
        alpha, sigma = self.at(t, x0)
        return alpha * eps - sigma * x0

    def to_x0(self, prediction: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The clean sample that a prediction stands for."""
        if self.config.prediction == "x0":
            return prediction
        alpha, sigma = self.at(t, z)
        if self.config.prediction == "v":
            return alpha * z - sigma * prediction
        return (z - sigma * prediction) / alpha

    def loss(self, output: Tensor, x0: Tensor, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Loss of each sample, `(b,)`: L_simple, plus vlb_weight times the bound if the variance is learned.

        Args:
            output: the network's, with twice the channels of x0 if it learns the variance.
        """
        prediction, fraction = split_variance(output.float(), x0.shape[1])
        loss = (prediction - self.target(x0, t, eps)).square().flatten(1).mean(1) * self.weight(t)
        if fraction is not None and self.config.vlb_weight:
            # The bound's gradient stops at the mean: it trains the variance alone.
            bound = self.bound(self.to_x0(prediction.detach(), z, t), fraction, x0, z, t)
            loss = loss + self.config.vlb_weight * self.config.steps * bound
        if self.on_loss is not None:
            self.on_loss(t, loss.detach())
        return loss

    def weight(self, t: Tensor) -> Tensor:
        """min-SNR-gamma weights `(b,)` (arXiv 2303.09556), 1 if off; at SNR 0 0.01, not 0, or it were never trained."""
        gamma = self.config.min_snr_gamma
        if gamma == 0:
            return torch.ones(len(t), device=t.device)
        abar = self.abar.to(t.device)[t]
        snr = abar / (1 - abar).clamp(min=1e-12)
        clipped = snr.clamp(max=gamma)
        divisor = {"eps": snr.clamp(min=1e-12), "v": snr + 1, "x0": torch.ones_like(snr)}[self.config.prediction]
        weight = clipped / divisor
        return torch.where(snr == 0, 0.01, weight).float()

    def bound(self, mean_x0: Tensor, fraction: Tensor, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The term L_t of the variational bound, in bits per dimension `(b,)` (arXiv 2102.09672, section 2)."""
        alpha_t, sigma_t = self.at(t, z)
        alpha_s, sigma_s = self.at((t - 1).clamp(min=0), z)
        first = (t == 0).view(-1, *[1] * (z.ndim - 1))
        alpha_s, sigma_s = torch.where(first, 1.0, alpha_s), torch.where(first, 0.0, sigma_s)
        true_mean, true_var, beta = posterior(x0, z, alpha_t, sigma_t, alpha_s, sigma_s)
        mean = posterior(mean_x0, z, alpha_t, sigma_t, alpha_s, sigma_s)[0]
        log_var = interpolated_log_variance(fraction, true_var, beta)
        true_log_var = true_var.clamp(min=1e-20).log()
        kl = 0.5 * (log_var - true_log_var - 1 + (true_log_var - log_var).exp()
                    + (true_mean - mean).square() * (-log_var).exp())  # fmt: skip
        nll = -discretised_log_likelihood(x0, mean, log_var)
        return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)

    def times(self, n: int, device: torch.device | str = "cpu", bend: float = 1.0) -> Times:
        """`n` times from the last step down, evenly spaced ("trailing", arXiv 2305.08891: the last is among them).

        With `bend` above 1 they are T (i / n)^bend, closer to each other near the clean sample, but no two the same.
        """
        if not 1 <= n <= self.config.steps:
            raise ValueError(f"the number of sampling steps must be 1 ... {self.config.steps}, not {n}.")
        if bend < 1:
            raise ValueError(f"the bend of sampling times is 1 or more, not {bend}.")
        even = 1 - torch.arange(n, dtype=torch.float64) / n
        t = torch.maximum((self.config.steps * even**bend).round().long(), torch.arange(n, 0, -1)) - 1
        abar = torch.cat((self.abar[t], torch.ones(1, dtype=torch.float64)))
        return Times(t.to(device), abar.sqrt().float().to(device), (1 - abar).sqrt().float().to(device))


def alphas_cumprod(schedule: str, steps: int) -> Tensor:
    """abar_t, float64 `(steps,)`, of the cosine or linear schedule; beta is at most 0.999."""
    if schedule == "cosine":
        g = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - g[1:] / g[:-1]).clamp(max=0.999)
    elif schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)
        beta = beta.clamp(max=0.999)
    else:
        raise ValueError(f"schedule '{schedule}' is not one of cosine, linear.")
    return torch.cumprod(1 - beta, dim=0)


def split_variance(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Prediction and the fraction v in [0, 1] of eq. 15 in arXiv 2102.09672, None if it is not learned."""
    if output.shape[1] == channels:
        return output, None
    prediction, raw = output.chunk(2, dim=1)
    return prediction, (raw + 1) / 2


def posterior(
    x0: Tensor, z: Tensor, alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q(z_s | z_t, x0) for s < t: mean, variance betatilde, and beta, the variance of q(z_t | z_s)."""
    ratio = alpha_t / alpha_s
    # 1 - ratio^2, which would cancel in float32 at small t
    beta = (sigma_t.square() - (ratio * sigma_s).square()).clamp(min=1e-20)
    mean = (alpha_s * beta * x0 + ratio * sigma_s.square() * z) / sigma_t.square()
    return mean, sigma_s.square() / sigma_t.square() * beta, beta


def interpolated_log_variance(fraction: Tensor, small: Tensor, large: Tensor) -> Tensor:
    """v log beta + (1 - v) log betatilde (arXiv 2102.09672, eq. 15); betatilde = 0 at the first step is replaced."""
    small = torch.where(small > 0, small, large)
    return fraction * large.clamp(min=1e-20).log() + (1 - fraction) * small.clamp(min=1e-20).log()


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """log p of 8-bit pixels x in [-1, 1] under a Gaussian, integrated over the pixel's bin (arXiv 2006.11239)."""
    scale = (-0.5 * log_var).exp()

    def cdf(value: Tensor) -> Tensor:
        return 0.5 * (1 + torch.erf((value - mean) * scale / math.sqrt(2)))

    upper = torch.where(x > 0.999, torch.ones_like(x), cdf(x + 1 / 255))
    lower = torch.where(x < -0.999, torch.zeros_like(x), cdf(x - 1 / 255))
    return (upper - lower).clamp(min=1e-12).log()


def gaussian_blur(x: Tensor, sigma: float, kernel: int = 3) -> Tensor:
    """Blur the last two dimensions of `n c h w` (unCLIP's degradation of the small image: kernel 3, sigma 0.6)."""
    if sigma <= 0:
        return x
    line = torch.exp(-0.5 * (torch.arange(kernel, device=x.device) - kernel // 2).square() / sigma**2).to(x.dtype)
    line = line / line.sum()
    weight = torch.outer(line, line).expand(x.shape[1], 1, kernel, kernel)
    return F.conv2d(F.pad(x, [kernel // 2] * 4, mode="reflect"), weight, groups=x.shape[1])


def low_res_condition(low: Tensor, size: int, diffusion: Diffusion, level: Tensor, noise: Tensor) -> Tensor:
    """What a super-resolution network sees of the small clip, in training and in sampling alike.

    Resized to the target, then noised to diffusion time `level` (noise conditioning, arXiv 2106.15282).

    Args:
        low: `b c f h w` in [-1, 1].
        level: diffusion times `b`; negative = no noise at all.
        noise: of the result's shape, `b c f size size`.
    """
    frames = low.shape[2]
    rows = F.interpolate(low.transpose(1, 2).flatten(0, 1), (size, size), mode="bilinear", align_corners=False)
    clip = rows.unflatten(0, (-1, frames)).transpose(1, 2)
    clean = (level < 0).view(-1, 1, 1, 1, 1)
    return torch.where(clean, clip, diffusion.noised(clip, level.clamp(min=0), noise))
