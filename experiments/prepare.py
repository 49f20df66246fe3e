"""`python -m experiments.prepare embed SIZE [key=value ...]`: what is computed once, before training.

`embed` writes the CLIP embeddings of every shard of `data.shards` beside it; with `data.embeddings=true` the prior and
the decoder then train from them. A shard that has its file is left alone, so an interrupted run goes on; under torchrun
or SLURM each process takes its share of the shards.
"""

import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datamodules import embeddings
from datamodules.image_text import Pairs, open_pairs
from datamodules.tars import expand
from experiments import build
from experiments.cli import for_people
from experiments.config import Config, load

log = logging.getLogger(__name__)


class Each(Dataset[Any]):
    """The samples of a shard in order, None for one that cannot be read."""

    def __init__(self, pairs: Pairs):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.pairs.load(index, 0, np.random.default_rng(0))
        except Exception:  # what cannot be read has a row of zeros; training skips and counts it
            return None


def embed(config: Config, batch_size: int = 256) -> dict[str, int]:
    """Embed every shard that has no embeddings yet.

    Returns:
        How many shards and samples were embedded, and how many of each could not be read.
    """
    clip, device = build.load_clip(config), build.device()
    if not config.data.shards:
        raise ValueError("data.shards is empty: name the tar shards of captioned images.")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    todo = embeddings.missing(expand(config.data.shards)[rank::world], clip.name)
    done = {"shards": 0, "samples": 0, "unreadable shards": 0, "unreadable samples": 0}
    for shard in tqdm(todo, "embed", unit="shard", disable=not sys.stderr.isatty()):
        try:
            pairs = open_pairs([shard], clip.image_size)[0]
        except ValueError as error:
            log.warning("Skipped a shard: %s", error)
            done["unreadable shards"] += 1
            continue
        loader = DataLoader(
            Each(pairs), batch_size, num_workers=config.prior.trainer.workers, collate_fn=lambda batch: batch
        )
        width = config.clip.model.embedding_width
        image, text = torch.zeros(len(pairs), width), torch.zeros(len(pairs), width)
        for rows, batch in readable(loader):
            pictures = torch.stack([sample["image"] for sample in batch]).to(device)
            image[rows] = clip.encode_image(pictures).cpu()
            tokens = clip.tokens([sample["text"] for sample in batch]).to(device)
            text[rows] = clip.encode_text(tokens).cpu()
            done["samples"] += len(rows)
        embeddings.write(pairs.entries, clip.name, image, text)
        done["shards"] += 1
        done["unreadable samples"] += int((~image.any(dim=1)).sum())
    return done


def readable(loader: DataLoader[Any]) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    """The samples of each batch that could be read, and their rows."""
    start = 0
    for batch in loader:
        rows = [start + i for i, sample in enumerate(batch) if sample is not None]
        if rows:
            yield rows, [sample for sample in batch if sample is not None]
        start += len(batch)


@for_people
def main(arguments: list[str]) -> None:
    if len(arguments) < 2 or arguments[0] != "embed":
        raise ValueError("usage: python -m experiments.prepare embed SIZE [key=value ...]")
    config = load(arguments[1], arguments[2:])
    done = embed(config)
    print(f"{', '.join(f'{n} {what}' for what, n in done.items())}; train from them with data.embeddings=true")


if __name__ == "__main__":
    main(sys.argv[1:])
