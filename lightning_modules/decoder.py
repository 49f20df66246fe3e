"""Training of D on images, then of D^t on unlabeled clips (paper, sections 3.1 and 3.2)."""

from typing import Any

import lightning as L
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.draws import Draws
from lightning_modules.optim import OptimConfig, optimizers
from lightning_modules.parallel import mean_of_ranks, shard
from models.cascade import pixel_denoiser
from models.clip import Clip, scaled
from models.diffusion import Diffusion
from models.samplers import clipped, ddim, guided
from models.unet import UNet

CLIP_FRAMES = ("first", "middle", "random", "mean")


class DecoderModule(L.LightningModule):
    """The decoder turns a CLIP image embedding into pixels. It never sees text.

    A batch of images trains D, a batch of clips D^t.

    Args:
        size: side in pixels of what the network makes; data are larger where CLIP reads larger pictures.
        clip_frame: whose CLIP embedding conditions a clip: first | middle | random | mean of all frames.
        drop: share of samples trained without embedding, for guidance (0.1 in unCLIP).
        guidance: of the pictures made while training.
    """

    def __init__(
        self,
        net: UNet,
        diffusion: Diffusion,
        clip: Clip,
        optim: OptimConfig,
        size: int,
        clip_frame: str = "first",
        drop: float = 0.1,
        freeze_spatial: bool = False,
        guidance: float = 2.0,
    ):
        super().__init__()
        if clip_frame not in CLIP_FRAMES:
            raise ValueError(f"clip_frame '{clip_frame}' is not one of {', '.join(CLIP_FRAMES)}.")
        self.net, self.diffusion, self.clip, self.optim, self.size = net, diffusion, clip, optim, size
        self.clip_frame, self.drop, self.guidance = clip_frame, drop, guidance
        if freeze_spatial:
            freeze_all_but_temporal(net)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", mean_of_ranks(self, loss), prog_bar=True)
        return loss

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The mean loss of a batch, with times and noise of each sample's seed."""
        x0 = resized(pixels(batch), self.size)
        draws = Draws(batch, len(x0), self.device)
        embedding = self.embedding(batch, draws)
        t = draws(torch.randint, self.diffusion.config.steps)
        eps = draws.noise(x0)
        z = self.diffusion.noised(x0, t, eps)
        drop = draws(torch.rand) < self.drop
        output = self.net(z, t, embedding=embedding, drop=drop, fps=batch.get("fps"), **self.given(x0, draws))
        return self.diffusion.loss(output, x0, z, t, eps).mean()

    def given(self, x0: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Further conditions of the network; the decoder has none."""
        return {}

    def embedding(self, batch: dict[str, Any], draws: Draws | None = None) -> Tensor:
        """The scaled CLIP image embedding `b d`: of each image, of each clip's chosen frame, or the batch's own."""
        if "image_embedding" in batch:
            return scaled(batch["image_embedding"].float())
        if "image" in batch:
            return scaled(self.clip.encode_image(batch["image"]))
        video: Tensor = batch["video"]
        b, _, f, _, _ = video.shape
        if self.clip_frame == "mean":
            every = self.clip.encode_image(rearrange(video, "b c f h w -> (b f) c h w"))
            return scaled(F.normalize(every.view(b, f, -1).mean(1), dim=-1))
        if self.clip_frame == "random":
            chosen = (draws or Draws(batch, b, video.device))(torch.randint, f)
        else:
            chosen = torch.full((b,), 0 if self.clip_frame == "first" else f // 2, device=video.device)
        return scaled(self.clip.encode_image(video[torch.arange(b, device=video.device), :, chosen]))

    def configure_model(self) -> None:
        shard(self)

    def configure_optimizers(self) -> Any:
        return optimizers(self.net, self.optim, self.trainer.max_steps)

    @torch.no_grad()
    def sample(self, batch: dict[str, Any], steps: int = 25) -> dict[str, Tensor]:
        """Pictures of the embeddings of a fixed batch, beside the originals: `real` and `made`, in [-1, 1]."""
        real = resized(pixels(batch), self.size)
        draws = Draws(batch, len(real), self.device)
        embedding, given = self.embedding(batch, draws), self.given(real, draws)
        shared = dict(embedding=embedding, fps=batch.get("fps"), **given)
        drop = torch.ones(len(real), dtype=torch.bool, device=self.device)
        denoise = guided(
            pixel_denoiser(self.net, self.diffusion, **shared),
            pixel_denoiser(self.net, self.diffusion, drop=drop, **shared),
            self.guidance,
        )
        made = ddim(clipped(denoise), torch.randn_like(real), self.diffusion.times(steps, self.device), lambda: real)
        return {"real": real, "made": made, **given}


def pixels(batch: dict[str, Any]) -> Tensor:
    """The pixels of a batch: uint8 to float in [-1, 1]."""
    return batch["video" if "video" in batch else "image"].float() / 127.5 - 1


def resized(x: Tensor, size: int) -> Tensor:
    """Images `b c h w` or clips `b c f h w` at `size` x `size`, antialiased."""
    if x.shape[-1] == size:
        return x

    def resize(rows: Tensor) -> Tensor:
        return F.interpolate(rows, (size, size), mode="bilinear", antialias=True, align_corners=False)

    return resize(x) if x.ndim == 4 else per_frame(x, resize)


def per_frame(clip: Tensor, function: Any) -> Tensor:
    """Apply a function of `n c h w` to the frames of `b c f h w`."""
    frames = clip.shape[2]
    return rearrange(function(rearrange(clip, "b c f h w -> (b f) c h w")), "(b f) c h w -> b c f h w", f=frames)


def freeze_all_but_temporal(net: UNet) -> None:
    """Train the layers that the image network did not have, and nothing else (`freeze_spatial`)."""
    temporal = net.temporal_keys()
    for key, parameter in net.named_parameters():
        parameter.requires_grad_(key in temporal)
