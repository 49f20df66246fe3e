"""Training of SR_l on images, SR_l^t on clips, and SR_h on images and frames of video (paper, section 3.2)."""

from typing import Any

import lightning as L
import torch
from einops import rearrange
from torch import Tensor

from lightning_modules.decoder import freeze_all_but_temporal, per_frame, pixels, resized
from lightning_modules.degradation import DRAWS, bsr
from lightning_modules.draws import Draws
from lightning_modules.optim import OptimConfig, optimizers
from lightning_modules.parallel import mean_of_ranks, shard
from models.cascade import pixel_denoiser
from models.diffusion import Diffusion, gaussian_blur, low_res_condition
from models.samplers import clipped, ddim
from models.unet import UNet

DEGRADATIONS = ("blur", "bsr")


class SuperResolutionModule(L.LightningModule):
    """Diffusion of the large clip, given the small one. It sees neither text nor embedding.

    Args:
        factor: large side / small side.
        blur: deviation of the Gaussian blur of the small clip, 3 pixels wide (0.6 in unCLIP for 64 -> 256).
        degradation: blur, of half of the samples (SR_l in unCLIP), or bsr, a random mix (SR_h).
        max_noise_level: the small clip is noised to a random diffusion time below this (arXiv 2106.15282).
    """

    def __init__(
        self,
        net: UNet,
        diffusion: Diffusion,
        optim: OptimConfig,
        factor: int,
        blur: float = 0.6,
        max_noise_level: int = 250,
        freeze_spatial: bool = False,
        degradation: str = "blur",
    ):
        super().__init__()
        if degradation not in DEGRADATIONS:
            raise ValueError(f"degradation '{degradation}' is not one of {', '.join(DEGRADATIONS)}.")
        self.net, self.diffusion, self.optim = net, diffusion, optim
        self.factor, self.blur, self.max_noise_level = factor, blur, max_noise_level
        self.degradation = degradation
        if freeze_spatial:
            freeze_all_but_temporal(net)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", mean_of_ranks(self, loss), prog_bar=True)
        return loss

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The mean loss of a batch, with times and noise of each sample's seed."""
        x0, fps = self.target(batch)
        draws = Draws(batch, len(x0), self.device)
        with torch.autocast(x0.device.type, enabled=False):  # bf16 would add a degradation of its own
            small = self.degraded(x0, draws)
        level = draws(torch.randint, max(1, self.max_noise_level))
        low = low_res_condition(small, x0.shape[-1], self.diffusion, level, draws.noise(x0))
        t = draws(torch.randint, self.diffusion.config.steps)
        eps = draws.noise(x0)
        z = self.diffusion.noised(x0, t, eps)
        output = self.net(z, t, low_res=low, noise_level=level, fps=fps)
        return self.diffusion.loss(output, x0, z, t, eps).mean()

    def degraded(self, x0: Tensor, draws: Draws) -> Tensor:
        """The large clips made small, and worse than they need be: SR must forgive what the stage before it does."""
        if self.degradation == "bsr":
            decisions = torch.cat([torch.rand(draws.each, DRAWS, generator=each) for each in draws.generators])
            return bsr(x0, self.factor, decisions, draws.noise(x0))
        half = draws(torch.rand) < 0.5  # half are blurred, as real inputs are not always soft
        small = resized(x0, x0.shape[-1] // self.factor)
        blurred = per_frame(small, lambda rows: gaussian_blur(rows, self.blur))
        return torch.where(half.view(-1, 1, 1, 1, 1), blurred, small)

    def target(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The large clips `b 3 f h w` and their fps; a network without time sees frames as images."""
        x0 = pixels(batch)
        if x0.ndim == 4:
            return x0.unsqueeze(2), None
        if self.net.temporal:
            return x0, batch["fps"]
        return rearrange(x0, "b c f h w -> (b f) c 1 h w"), None

    def configure_model(self) -> None:
        shard(self)

    def configure_optimizers(self) -> Any:
        return optimizers(self.net, self.optim, self.trainer.max_steps)

    @torch.no_grad()
    def sample(self, batch: dict[str, Any], steps: int = 20) -> dict[str, Tensor]:
        """The fixed batch made small, large again, and as it was: `low`, `made` and `real` in [-1, 1]."""
        real, fps = self.target(batch)
        level = torch.full((len(real),), -1, device=self.device)
        noise = torch.randn_like(real)
        low = low_res_condition(
            resized(real, real.shape[-1] // self.factor), real.shape[-1], self.diffusion, level, noise
        )
        denoise = pixel_denoiser(self.net, self.diffusion, low_res=low, noise_level=level.clamp(min=0), fps=fps)
        made = ddim(clipped(denoise), noise, self.diffusion.times(steps, self.device), lambda: noise)
        return {"low": low, "made": made, "real": real}
