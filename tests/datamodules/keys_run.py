"""A training run that writes down the keys it trains on: started, killed and resumed by test_trust.py.

python keys_run.py FOLDER STEPS WORKERS BATCH PATTERN [PUNSAFE]; ranks are torchrun's RANK and WORLD_SIZE.
"""

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import ImageTextDataModule
from datamodules.filters import FilterConfig


class Keys(L.LightningModule):
    def __init__(self, folder: Path):
        super().__init__()
        self.layer, self.folder = torch.nn.Linear(1, 1), folder

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        with (self.folder / f"keys_{self.global_rank}.txt").open("a") as file:
            file.write(f"{self.global_step} {' '.join(batch['key'])}\n")
        pixels = batch["image"] if "image" in batch else batch["video"]
        return self.layer(pixels.float().mean().view(1, 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def main() -> None:
    folder, steps, workers, batch, pattern = Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5]
    filters = FilterConfig(punsafe=float(sys.argv[6])) if len(sys.argv) > 6 else None
    world = int(os.environ.get("WORLD_SIZE", 1))
    last = folder / "last.ckpt"
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, save_last="link", filename="{step}")],
    )
    data = ImageTextDataModule(pattern, batch, 8, workers=workers, filters=filters)
    trainer.fit(Keys(folder), datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)


if __name__ == "__main__":
    main()
