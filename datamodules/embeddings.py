"""CLIP embeddings computed once, in a file beside each shard: `00000.tar` -> `00000.<clip>.safetensors`.

A file holds `image` and `text`, float16 `n d` of unit norm, a row for each sample of the shard in its order, and in its
header a digest of the samples. A sample that CLIP could not read has a row of zeros.
"""

import hashlib
import logging
import re
from collections.abc import Sequence
from itertools import groupby

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from datamodules.remote import exists, local, whole
from datamodules.tars import Entry

log = logging.getLogger(__name__)


def beside(shard: str, clip: str) -> str:
    """The address of the file with a shard's embeddings by the CLIP of that name."""
    return f"{shard.removesuffix('.tar')}.{re.sub(r'[^A-Za-z0-9_-]+', '-', clip)}.safetensors"


def missing(shards: Sequence[str], clip: str) -> list[str]:
    """Shards that have no embeddings by this CLIP yet."""
    return [shard for shard in shards if not exists(beside(shard, clip))]


def write(entries: Sequence[Entry], clip: str, image: Tensor, text: Tensor) -> None:
    """Write the embeddings of a shard's entries, whole or not at all."""
    header = {"clip": clip, "keys": digest(entries)}
    with whole(beside(entries[0].shard, clip)) as part:
        save_file({"image": image.half().contiguous(), "text": text.half().contiguous()}, part, header)


def rows(entries: Sequence[Entry], clip: str) -> list[int]:
    """The row of each entry in its shard's file; entries are those of whole shards, in order.

    It is -1, which `read` refuses, where the file cannot be fetched. Raises ValueError where a shard has changed since.
    """
    found: list[int] = []
    for shard, group in groupby(entries, key=lambda entry: entry.shard):
        members = list(group)
        path = beside(shard, clip)
        try:
            here = local(path)
        except (ValueError, OSError) as error:
            log.warning("No embeddings for the samples of %s: %s.", shard, error)
            found += [-1] * len(members)
            continue
        try:
            with safe_open(here, "pt") as file:
                header = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): remove it and run `make embed` again.") from None
        if header.get("clip") != clip or header.get("keys") != digest(members):
            raise ValueError(f"{path} is of another CLIP, or {shard} has changed since its embeddings were computed: "
                             "remove it and run `make embed` again.")  # fmt: skip
        found += range(len(members))
    return found


def read(shard: str, row: int, clip: str) -> dict[str, Tensor]:
    """`image_embedding` and `text_embedding`, float32 `d`. Raises ValueError for a row of zeros, and for -1."""
    if row < 0:
        raise ValueError("the embeddings of the shard could not be fetched")
    with safe_open(local(beside(shard, clip)), "pt") as file:
        image, text = (file.get_slice(name)[row].float() for name in ("image", "text"))
    if not image.any() or not text.any():
        raise ValueError("the sample could not be read when embeddings were computed")
    # float16 has rounded the norm as well
    return {"image_embedding": normalize(image, dim=0), "text_embedding": normalize(text, dim=0)}


def digest(entries: Sequence[Entry]) -> str:
    """One value for the samples of a shard, in order: their keys, and where their files lie."""
    lines = (f"{entry.key} {sorted(entry.members.items())}" for entry in entries)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
