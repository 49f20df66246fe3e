"""A trainer of a few steps, a CLIP and networks small enough for a test."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from models.clip import Clip, ClipConfig, build_clip
from models.unet import UNet, UNetConfig


class Forever:
    """The same batch again and again, without a length."""

    def __init__(self, batch: dict[str, Any]):
        self.batch = batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield self.batch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def clip_net() -> nn.Module:
    shape = dict(vision_width=16, vision_layers=1, text_width=16, text_layers=1, head_width=8)
    return build_clip(ClipConfig(embedding_width=16, image_size=8, patch_size=4, context_length=12, **shape))


@pytest.fixture
def clip(clip_net: nn.Module) -> Clip:
    return Clip(clip_net, "small")


@pytest.fixture
def unet() -> Callable[..., UNet]:
    """unet(temporal=..., masked=..., **config): a U-Net whose spatial weights look trained."""

    def make(temporal: bool = False, masked: bool = False, **config: Any) -> UNet:
        shape = dict(width=8, multiples=[1, 2], blocks=1, attention=[2], head_width=8) | config
        net = UNet(UNetConfig(**shape), temporal=temporal, masked=masked)
        begin = net.temporal_keys()
        with torch.no_grad():
            for key, p in net.named_parameters():
                if key not in begin and p.ndim > 1:
                    p.copy_(torch.randn_like(p) / p[0].numel() ** 0.5)
        return net

    return make


@pytest.fixture
def fit() -> Callable[..., L.Trainer]:
    """fit(module, batch, callbacks, steps=2, ckpt_path=None, **options) trains on one batch, returns the trainer."""

    def do(
        module: L.LightningModule, batch: dict[str, Any], *callbacks: L.Callback, steps: int = 2, **options: Any
    ) -> Any:
        path = options.pop("ckpt_path", None)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(module, Forever(batch), ckpt_path=path, **({"weights_only": True} if path else {}))
        return trainer

    return do
