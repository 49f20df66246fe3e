"""Training of P: text to CLIP image embedding. The only stage that sees text (paper, section 3.1)."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_modules.draws import Draws
from lightning_modules.optim import OptimConfig, optimizers
from lightning_modules.parallel import mean_of_ranks, shard
from models.clip import Clip, cut_captions, scaled
from models.diffusion import Diffusion


class PriorModule(L.LightningModule):
    """The prior predicts the clean image embedding from captions (unCLIP, arXiv 2204.06125, section 2.2).

    A batch holds captions, and images or embeddings that CLIP made of them beforehand (`image_embedding` and
    `text_embedding`, unit norm, `b d`).

    Args:
        drop: share of samples trained without text, for guidance (0.1 in unCLIP).
    """

    def __init__(self, net: nn.Module, diffusion: Diffusion, clip: Clip, optim: OptimConfig, drop: float = 0.1):
        super().__init__()
        self.net, self.diffusion, self.clip, self.optim, self.drop = net, diffusion, clip, optim, drop

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", mean_of_ranks(self, loss), prog_bar=True)
        self.log("data/captions_cut", cut_captions(self.clip.tokens(batch["text"])))
        return loss

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The mean loss of a batch, with times and noise of each sample's seed."""
        tokens = self.clip.tokens(batch["text"]).to(self.device)
        if "image_embedding" in batch:
            x0, text = scaled(batch["image_embedding"].float()), scaled(batch["text_embedding"].float())
        else:
            x0, text = scaled(self.clip.encode_image(batch["image"])), scaled(self.clip.encode_text(tokens))
        draws = Draws(batch, len(x0), self.device)
        t = draws(torch.randint, self.diffusion.config.steps)
        eps = draws.noise(x0)
        z = self.diffusion.noised(x0, t, eps)
        output = self.net(z, t, tokens, text, drop=draws(torch.rand) < self.drop)
        return self.diffusion.loss(output, x0, z, t, eps).mean()

    def configure_model(self) -> None:
        shard(self)

    def configure_optimizers(self) -> Any:
        return optimizers(self.net, self.optim, self.trainer.max_steps)

    def sample(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Nothing to look at: an embedding has no picture before the decoder."""
        return {}
