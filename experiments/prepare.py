"""`python -m experiments.prepare WHAT ...`: what is computed once, before training.

index SIZE    keep the index of every tar shard of `data.shards` beside it: training then starts at once, and remote
              shards are fetched only when their samples are due.
embed SIZE    write the CLIP embeddings of every shard of `data.shards` beside it; with `data.embeddings=true` the prior
              and the decoder then train from them.
inspect PATH  what a set of images or videos holds, what filters would take of it, and a contact sheet.

A shard that has its file is left alone, so an interrupted run goes on; under torchrun or SLURM each process takes its
share of the shards.
"""

import logging
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datamodules import embeddings
from datamodules.image_text import Pairs, open_pairs
from datamodules.remote import exists
from datamodules.shards import describe
from datamodules.tars import expand, index_beside, write_index
from experiments import build
from experiments.cli import for_people
from experiments.config import Config, load
from experiments.survey import inspect
from models.clip import Clip

log = logging.getLogger(__name__)


class Each(Dataset[Any]):
    """The samples of a shard in order; for one that cannot be read the cause, a string."""

    def __init__(self, pairs: Pairs):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.pairs.load(index, 0, np.random.default_rng(0))
        except ValueError as error:  # what is broken stays so; a disk or a network that fails does not
            return describe(error)


def share(config: Config) -> list[str]:
    """This process's part of the tar shards."""
    if not config.data.shards:
        raise ValueError("data.shards is empty: name the tar shards of captioned images.")
    shards = [shard for shard in expand(config.data.shards) if shard.endswith(".tar")]
    if not shards:
        raise ValueError(
            f"data.shards={config.data.shards} holds no tar shards; pictures listed in a CSV file are read as they are."
        )
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    world = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1)))
    return shards[rank::world]


def index(config: Config) -> Counter[str]:
    """Write the index of every shard that has none. Returns what was done, and what could not be."""
    done: Counter[str] = Counter()
    todo = [shard for shard in share(config) if not exists(index_beside(shard))]
    for shard in tqdm(todo, "index", disable=not sys.stderr.isatty()):
        try:
            done["samples"] += write_index(shard)
            done["shards"] += 1
        except ValueError as error:
            log.warning("Skipped a shard: %s", error)
            done["shards left without"] += 1
    return done


def embed(config: Config, batch_size: int = 256) -> Counter[str]:
    """Embed every shard that has no embeddings yet. Returns what was done, and what could not be, by cause."""
    clip = build.load_clip(config)
    done: Counter[str] = Counter()
    for shard in tqdm(embeddings.missing(share(config), clip.name), "embed", disable=not sys.stderr.isatty()):
        try:
            pairs, report = open_pairs([shard], clip.image_size)
        except ValueError as error:
            log.warning("Skipped a shard: %s", error)
            done["shards left without"] += 1
            continue
        done.update(f"not in the index: {cause}" for _, cause in report.problems)
        loader = DataLoader(Each(pairs), batch_size, num_workers=config.prior.trainer.workers, collate_fn=list)
        parts = [embed_batch(clip, batch, config.clip.model.embedding_width, done) for batch in loader]
        image, text = (torch.cat(part) for part in zip(*parts, strict=True))
        embeddings.write(pairs.entries, clip.name, image, text)
        done["shards"] += 1
    return done


def embed_batch(clip: Clip, batch: list[Any], width: int, done: Counter[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of pictures and captions `n d`; rows of zeros for what could not be read."""
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    image, text = torch.zeros(len(batch), width), torch.zeros(len(batch), width)
    rows = [i for i, sample in enumerate(batch) if not isinstance(sample, str)]
    done.update(f"without: {cause}" for cause in batch if isinstance(cause, str))
    if rows:
        done["samples"] += len(rows)
        pictures = torch.stack([batch[i]["image"] for i in rows]).to(device)
        image[rows] = clip.encode_image(pictures).cpu()
        text[rows] = clip.encode_text(clip.tokens([batch[i]["text"] for i in rows]).to(device)).cpu()
    return image, text


@for_people
def main(arguments: list[str]) -> None:
    if len(arguments) < 2 or arguments[0] not in ("index", "embed", "inspect"):
        raise ValueError("usage: python -m experiments.prepare index|embed SIZE, or inspect PATH [key=value ...]")
    what, where, *overrides = arguments
    if what == "inspect":
        sheet = Path("runs/inspect") / f"{Path(where).name or 'data'}.png"
        sheet.parent.mkdir(parents=True, exist_ok=True)
        print(inspect(where, load("tiny", overrides).data.filters, sheet))
        return
    done = (index if what == "index" else embed)(load(where, overrides))
    print(", ".join(f"{n} {what}" for what, n in done.items()) or "nothing to do: every shard has its file")


if __name__ == "__main__":
    main(sys.argv[1:])
