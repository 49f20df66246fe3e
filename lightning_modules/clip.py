"""Training of a CLIP of our own, for where no pretrained one can be had (arXiv 2103.00020)."""

from typing import Any

import lightning as L
import open_clip
import torch
from torch import Tensor, nn

from lightning_modules.optim import OptimConfig, optimizers
from lightning_modules.parallel import mean_of_ranks, shard
from models.clip import cut_captions, preprocess


class ClipModule(L.LightningModule):
    """Contrastive training of an open_clip model on captioned images."""

    def __init__(self, net: nn.Module, optim: OptimConfig):
        super().__init__()
        self.net, self.optim = net, optim
        self.tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=net.context_length)  # type: ignore[arg-type]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", mean_of_ranks(self, loss), prog_bar=True)
        self.log("data/captions_cut", cut_captions(self.tokenizer(batch["text"])))
        return loss

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The mean loss of a batch: pictures and captions of all ranks are told apart, but for a fixed batch."""
        mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=self.device)
        std = torch.tensor(open_clip.OPENAI_DATASET_STD, device=self.device)
        images = preprocess(batch["image"], self.net.visual.image_size[0], mean, std)  # type: ignore
        tokens = self.tokenizer(batch["text"]).to(self.device)
        image, text, scale = self.net(images, tokens)
        world = self.trainer.world_size if self.training else 1  # all ranks measure the same fixed batch
        contrast = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=self.global_rank, world_size=world)
        return contrast(image.float(), text.float(), scale.float())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step, and what belongs to it: averages and checkpoints are taken afterwards."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():  # CLIP, section 2.5: the scale of the logits stays below 100
            self.net.logit_scale.clamp_(max=4.6052)  # type: ignore[operator, union-attr]

    def configure_model(self) -> None:
        shard(self)

    def configure_optimizers(self) -> Any:
        return optimizers(self.net, self.optim, self.trainer.max_steps)

    def sample(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Nothing to look at."""
        return {}
