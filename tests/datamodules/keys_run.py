"""A training run that writes down what it trains on: started, killed and resumed by test_trust.py."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import Curriculum, ImageTextDataModule, VideoDataModule
from datamodules.filters import FilterConfig
from lightning_modules.callbacks import DataCounts


class Keys(L.LightningModule):
    def __init__(self, folder: Path):
        super().__init__()
        self.layer, self.folder = torch.nn.Linear(1, 1), folder

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        pixels = batch["image"] if "image" in batch else batch["video"]
        with (self.folder / f"keys_{self.global_rank}.txt").open("a") as file:
            # pixels tell of crops, starts and rates too
            seen = [f"{k}/{zlib.crc32(p.numpy().tobytes())}" for k, p in zip(batch["key"], pixels, strict=True)]
            file.write(f"{self.global_step} {' '.join(seen)}\n")
        return self.layer(pixels.float().mean().view(1, 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def run(
    folder: Path,
    steps: int,
    workers: int,
    batch: int,
    source: str,
    punsafe: float | None,
    rank: int,
    world: int,
    port: int,
) -> None:
    """A rank's process; what goes wrong is in errors_RANK.txt."""
    os.setsid()  # so that it can be killed together with its workers
    errors = (folder / f"errors_{rank}.txt").open("w")
    os.dup2(errors.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    if world > 1:
        os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "keys"}
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
        callbacks=[
            ModelCheckpoint(folder, every_n_train_steps=1, save_last="link", filename="{step}"),
            DataCounts(every=5),
        ],
    )
    data: ImageTextDataModule | VideoDataModule
    source = source.replace("RANK", str(rank))
    if Path(source).name == "clips":
        data = VideoDataModule(source, batch, 2, 8, 6, curriculum=Curriculum(steps=20), workers=workers)
    else:
        filters = FilterConfig(punsafe=punsafe) if punsafe else None
        data = ImageTextDataModule(source, batch, 8, 6, workers=workers, filters=filters)
    trainer.fit(Keys(folder), datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
    (folder / f"skipped_{rank}.json").write_text(json.dumps(data.skipped))
