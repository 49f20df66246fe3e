"""CLIP embeddings computed once, in a file beside each shard: `00000.tar` -> `00000.<clip>.safetensors`.

A file holds `image` and `text`, float16 `n d` of unit norm, a row for each sample of the shard in its order, and in its
header a digest of the samples' keys. A sample that CLIP could not read has a row of zeros.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from datamodules.tars import Entry


def beside(shard: str, clip: str) -> Path:
    """The file with a shard's embeddings by the CLIP of that name."""
    return Path(shard).with_suffix(f".{re.sub(r'[^A-Za-z0-9_-]+', '-', clip)}.safetensors")


def missing(shards: Sequence[str], clip: str) -> list[str]:
    """Shards that have no embeddings yet."""
    return [shard for shard in shards if not beside(shard, clip).exists()]


def write(entries: Sequence[Entry], clip: str, image: Tensor, text: Tensor) -> None:
    """Write the embeddings of a shard's entries, whole or not at all."""
    path = beside(entries[0].shard, clip)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    header = {"clip": clip, "keys": digest(entries)}
    save_file({"image": image.half().contiguous(), "text": text.half().contiguous()}, part, header)
    os.replace(part, path)


def rows(entries: Sequence[Entry], clip: str) -> list[int]:
    """The row of each entry in its shard's file; entries are those of whole shards, in order.

    Raises ValueError where a shard has changed since.
    """
    found: list[int] = []
    for shard, group in groupby(entries, key=lambda entry: entry.shard):
        members = list(group)
        path = beside(shard, clip)
        with safe_open(path, "pt") as file:
            if file.metadata()["keys"] != digest(members):
                raise ValueError(f"{shard} has changed since its embeddings were computed: remove {path} and run "
                                 "`make embed` again.")  # fmt: skip
        found += range(len(members))
    return found


def read(shard: str, row: int, clip: str) -> dict[str, Tensor]:
    """`image_embedding` and `text_embedding`, float32 `d`. Raises ValueError for a row of zeros."""
    with safe_open(beside(shard, clip), "pt") as file:
        image, text = (file.get_slice(name)[row].float() for name in ("image", "text"))
    if not image.any() or not text.any():
        raise ValueError("the sample could not be read when embeddings were computed")
    # float16 has rounded the norm as well
    return {"image_embedding": normalize(image, dim=0), "text_embedding": normalize(text, dim=0)}


def digest(entries: Sequence[Entry]) -> str:
    """One value for the keys of a shard, in order."""
    return hashlib.sha256("\n".join(entry.key for entry in entries).encode()).hexdigest()
