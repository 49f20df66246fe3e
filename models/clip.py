"""A frozen open_clip model behind `encode_text` and `encode_image`.

`Clip` is no nn.Module on purpose: a LightningModule can hold it without taking it into its checkpoints, its
EMA or its optimiser.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor
from torch.nn import functional as F


@dataclass
class ClipConfig:
    """Either a pretrained open_clip model by `name`, or the shape of a small one of our own."""

    name: str = ""  # an architecture of open_clip, as ViT-H-14; empty = a model of our own, trained by train-clip
    pretrained: str = ""  # open_clip tag (downloaded), or path of a checkpoint
    sha256: str = ""  # of the checkpoint at that path; empty = not checked
    embedding_width: int = 1024  # of the joint space; must agree with the named model
    image_size: int = 224
    context_length: int = 77
    # the shape of our own
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    text_width: int = 512
    text_layers: int = 12
    head_width: int = 64


def build_clip(config: ClipConfig) -> torch.nn.Module:
    """An open_clip model of our own shape, with fresh weights."""
    return open_clip.CLIP(
        embed_dim=config.embedding_width,
        vision_cfg={
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.vision_width,
            "layers": config.vision_layers,
            "head_width": config.head_width,
        },
        text_cfg={
            "context_length": config.context_length,
            "width": config.text_width,
            "layers": config.text_layers,
            "heads": config.text_width // config.head_width,
        },
        nonscalar_logit_scale=True,  # FSDP2 splits no scalars
    )


def quick_gelu(config: ClipConfig) -> bool:
    """Are the weights of the tag of QuickGELU, as OpenAI's? Under a plain name open_clip builds GELU and only warns."""
    return bool(open_clip.get_pretrained_cfg(config.name, config.pretrained).get("quick_gelu"))


class Clip:
    """Embeds text and images in CLIP's joint space.

    Args:
        model: an open_clip model; frozen and put in eval mode.
        name: what metrics print as the backbone.
        tokenizer: texts -> tokens `n 77`; open_clip's BPE if not given.
        config: what the model was built from, to build it again (`models.pretrained`).
    """

    def __init__(
        self,
        model: Any,
        name: str,
        tokenizer: Callable[..., Tensor] | None = None,
        config: ClipConfig | None = None,
    ):
        self.model, self.config = model, config
        self.model.eval().requires_grad_(False)
        self.name = name
        self.tokenizer = tokenizer or open_clip.get_tokenizer("ViT-B-32", context_length=model.context_length)
        size = self.model.visual.image_size
        self.image_size: int = size[0] if isinstance(size, (tuple, list)) else size
        self.mean = torch.tensor(getattr(self.model.visual, "image_mean", None) or OPENAI_DATASET_MEAN)
        self.std = torch.tensor(getattr(self.model.visual, "image_std", None) or OPENAI_DATASET_STD)

    def to(self, device: torch.device) -> "Clip":
        """Move the model; done once, on the first call with data of a device."""
        if next(self.model.parameters()).device != device:
            self.model.to(device)
            self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """BPE tokens `n 77`, cut at CLIP's length and padded with 0."""
        return self.tokenizer(list(texts))

    def truncated(self, text: str) -> bool:
        """Does the text hold more tokens than CLIP reads (77 with the start and end tokens)?"""
        encode = getattr(self.tokenizer, "encode", None)
        length = int(getattr(self.tokenizer, "context_length", 77) or 77)
        return encode is not None and len(encode(text)) > length - 2

    def encode_text(self, texts: Sequence[str] | Tensor, device: torch.device | None = None) -> Tensor:
        """Unit-norm embeddings `n d` of texts or of their tokens."""
        tokens = texts if isinstance(texts, Tensor) else self.tokens(texts)
        tokens = tokens.to(device) if device is not None else tokens
        with torch.no_grad():
            return F.normalize(self.to(tokens.device).model.encode_text(tokens).float(), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit-norm embeddings `n d` of uint8 images `n 3 h w`."""
        return F.normalize(self.image_features(images), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """The same before their norm is set to one: what CLIP-FID is of."""
        self.to(images.device)
        with torch.no_grad():
            return self.model.encode_image(self.preprocess(images)).float()

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 `n 3 h w` to CLIP's input: short side resized (bicubic, antialiased), centre crop, normalised."""
        return preprocess(images, self.image_size, self.mean, self.std)


def preprocess(images: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """As `Clip.preprocess`, for a model that is still in training."""
    x = images.float() / 255
    height, width = x.shape[-2:]
    if min(height, width) != size:
        ratio = size / min(height, width)
        shape = (max(size, round(height * ratio)), max(size, round(width * ratio)))
        x = F.interpolate(x, shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (x.shape[-2] - size) // 2, (x.shape[-1] - size) // 2
    x = x[..., top : top + size, left : left + size]
    return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def cut_captions(tokens: Tensor) -> float:
    """How many of these captions fill CLIP's context to its last token, so that their end is cut off."""
    return float((tokens[:, -1] != 0).sum())


def scaled(embedding: Tensor) -> Tensor:
    """Unit-norm embeddings `n d` to unit variance per coordinate: what the prior and the decoders see."""
    return embedding * math.sqrt(embedding.shape[-1])
