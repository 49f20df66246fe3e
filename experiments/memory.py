"""How much memory a training step of a stage takes, computed without doing the work.

The step runs on tensors that have shapes and no data, every one of which is counted from its making to its end. What is
not a tensor of the step is not in the sum: the CUDA context, what cuDNN and the allocator take, and the frozen CLIP.
"""

import weakref
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments import build
from experiments.config import Config, VideoStage
from models.unet import UNet


class Living(TorchDispatchMode):
    """The bytes of all tensors that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.remove, key)

    def remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


def training_bytes(config: Config, stage: str) -> int:
    """Bytes of a step of a stage in bf16 mixed precision: weights, gradients, AdamW, averaged weights, activations."""
    # Parameters without data cannot be moved to another memory order, which changes nothing of their size.
    with FakeTensorMode(allow_non_fake_inputs=True), patch.object(nn.Module, "to", lambda net, *_, **__: net):
        net, living = build.network(config, stage), Living()
        with living:
            parameters = 0
            for p in net.parameters():
                living.add(p)
                parameters += p.numel()
            with torch.autocast("cpu", torch.bfloat16):
                output = net(**inputs(config, stage, net))
            output.float().square().mean().backward()
    return living.most + 3 * 4 * parameters  # two moments and the average, float32


def inputs(config: Config, stage: str, net: nn.Module) -> dict[str, Tensor]:
    """A batch as the stage's network sees it."""
    part = build.section(config, stage)
    batch, width = part.trainer.batch_size, config.clip.model.embedding_width
    t = torch.zeros(batch, dtype=torch.long)
    if stage == "prior":
        tokens = torch.ones(batch, config.prior.model.context_length, dtype=torch.long)
        return {"z": torch.zeros(batch, width), "t": t, "tokens": tokens, "text": torch.zeros(batch, width)}
    assert isinstance(net, UNet)
    frames = part.frames if isinstance(part, VideoStage) else 1
    if not net.temporal:  # SR_h sees the frames of clips as images
        batch, frames = batch * frames, 1
    side = build.super_resolution(config, stage).crop if stage.startswith("sr_") else config.decoder.size
    x = torch.zeros(batch, 3, frames, side, side)
    given: dict[str, Tensor] = {"x": x, "t": torch.zeros(batch)}
    if net.config.embedding_width:
        given["embedding"] = torch.zeros(batch, width)
    if net.config.low_res:
        given |= {"low_res": x, "noise_level": torch.zeros(batch)}
    if net.temporal:
        given["fps"] = torch.ones(batch)
    if net.masked:
        given["given"] = torch.zeros(batch, 4, frames, side, side)
    return given
