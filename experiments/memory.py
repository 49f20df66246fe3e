"""What a training step of a stage takes, memory and work, computed without doing it.

The step runs on tensors that have shapes and no data (`FakeTensorMode`), every one of which is followed from its making
to its end; work is counted by torch's formulas (`torch.utils.flop_counter`). Traced for batches of two and of three:
every moment of a step is linear in its batch, so these two give the peak of any batch exactly.

What is not a tensor of the step is not in the sum: the CUDA context, cuDNN's workspace, buffers of NCCL, and what the
allocator loses between tensors. torch.compile mostly takes less than is computed here.
"""

import gc
import logging
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import lightning as L
import numpy as np
import open_clip
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from experiments import build
from experiments.bench_model import peak_memory
from experiments.config import Config, VideoStage
from lightning_modules.decoder import freeze_all_but_temporal
from lightning_modules.optim import optimizers
from lightning_modules.parallel import BLOCKS
from models import p3d
from models.clip import Clip, ClipConfig, build_clip
from models.unet import UNet

STRATEGIES = ("one GPU", "DDP", "FSDP2")
KINDS = ("activations", "gradients", "copies", "outer copies")
FLOAT, GIB = 4, 2**30  # bytes

# torch's formulas know attention on a GPU alone; the operations of a CPU take the same arguments
aten = torch.ops.aten
FORMULAS: dict[Any, Any] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class Trace(TorchDispatchMode):
    """The life of all tensors that are made under it, and the work.

    `events` are (number of a tensor, bytes), negative at its end; the network's own tensors are not among them. `kinds`
    says of each tensor what it is: activations, gradients, or a copy of a weight, in blocks or outside of them.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.weights = {p.untyped_storage()._cdata: "outer copies" for p in [*net.parameters(), *net.buffers()]}
        for block in net.modules():
            if isinstance(block, BLOCKS):
                self.weights |= {p.untyped_storage()._cdata: "copies" for p in block.parameters()}
        self.alive: dict[int, int] = {}  # storage -> number of the tensor
        self.events: list[tuple[int, int]] = []
        self.kinds: list[str] = []
        self.flops = 0

    def add(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive and key not in self.weights:
            self.alive[key] = len(self.kinds)
            self.events.append((len(self.kinds), size))
            self.kinds.append(kind)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.events.append((self.alive.pop(key), -size))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        formula = FORMULAS.get(function._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        kind = "activations"
        if function is aten._to_copy.default:
            kind = self.weights.get(args[0].untyped_storage()._cdata, kind)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf, kind)
        return result

    def bytes_of(self, kind: str) -> np.ndarray:
        """Bytes of all tensors of a kind that are alive, after each event."""
        return np.cumsum([size if self.kinds[tensor] == kind else 0 for tensor, size in self.events], dtype=np.int64)


@dataclass(frozen=True)
class Parts:
    """Bytes on one GPU. The peak is the most at one time: less than the sum, as gradients come while activations go."""

    weights: float
    copies: float  # of weights, in bf16, that autocast keeps from forward to backward; under FSDP2 what is gathered
    gradients: float  # under DDP with the buckets that they are sent in
    adamw: float
    ema: float
    clip: float
    activations: float
    peak: float


@dataclass(frozen=True)
class Step:
    """A training step of one stage as a function of its batch. Sizes in parameters, arrays in bytes at each event."""

    parameters: int
    trained: int
    block: int  # the largest that FSDP2 gathers whole
    outside: int  # of all blocks: gathered together, in float32
    copies: np.ndarray  # of weights, in bf16, of blocks
    outer_copies: np.ndarray  # and outside of them
    gradients: np.ndarray
    batch: int  # that was traced
    activations: np.ndarray  # of it
    further: np.ndarray  # of each further sample
    flops: float  # of one sample, forward and backward, what is computed again for checkpointing included
    clip_parameters: int  # of the frozen CLIP, all of which is on the GPU
    clip_activations: tuple[int, int]  # the most of one sample, and what each further one adds
    clip_flops: float  # of one sample, forward
    mixed: bool
    roots: int  # parameters of which an AdamW that is not fused holds roots at one time

    def parts(self, batch: int, strategy: str = "one GPU", shards: int = 1, accumulate: int = 1) -> Parts:
        """Memory of one GPU for a batch of its own.

        One GPU holds everything. DDP adds its buckets, a second copy of the gradients. FSDP2 holds `1 / shards` of
        weights, gradients, AdamW and EMA. For the largest block it gathers weights in bf16 three times over (in use,
        fetched ahead, as they arrive) and has gradients in bf16 and, to be summed, in float32; for what is outside of
        blocks weights and gradients in float32. CLIP is never split.
        """
        share = 1 / shards if strategy == "FSDP2" else 1.0
        weights, trained = FLOAT * self.parameters * share, FLOAT * self.trained * share
        adamw, clip = 2 * trained, FLOAT * self.clip_parameters
        buckets = trained if strategy == "DDP" else 0.0
        copies: Any = self.copies + self.outer_copies
        if strategy == "FSDP2":
            copies = self.outer_copies + (12 if self.mixed else 20) * self.block + 2 * FLOAT * self.outside
        activations = self.activations + (batch - self.batch) * self.further
        # what accumulates is there from the second batch of a step on
        gradients: Any = np.full_like(self.gradients, trained) if accumulate > 1 else self.gradients * share
        fixed = 2 * weights + adamw + clip + buckets
        first, further = self.clip_activations
        peak = max(
            max(copies + gradients + activations),
            first + (batch - 1) * further + (trained if accumulate > 1 else 0),
            trained + FLOAT * self.roots * share,  # AdamW's step
        )
        return Parts(
            weights=weights,
            copies=float(max(copies)),
            gradients=trained + buckets,
            adamw=adamw,
            ema=weights,
            clip=clip,
            activations=float(max(activations)),
            peak=float(fixed + peak),
        )

    def largest_batch(self, limit: float, strategy: str = "one GPU", shards: int = 1, accumulate: int = 1) -> int:
        """The largest batch whose peak is within a limit of bytes, 0 if none is."""

        def fits(batch: int) -> bool:
            return self.parts(batch, strategy, shards, accumulate).peak <= limit

        low, high = 0, 1
        while fits(high) and high < 2**20:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def mixed(config: Config, stage: str, device: str) -> bool:
    """Does the stage train in mixed precision? What is `auto` is so on a GPU."""
    name = build.section(config, stage).trainer.precision
    if device == "cpu":
        name = build.precision(name)
    return name == "auto" or name.endswith("mixed")


def empty_network(config: Config, stage: str) -> nn.Module:
    """The network of a stage without data, on the meta device; what is frozen is."""
    with torch.device("meta"):
        net = build.network(config, stage)
    if isinstance(net, UNet) and net.temporal and getattr(build.section(config, stage), "freeze_spatial", False):
        freeze_all_but_temporal(net)
    return net


def sees_clip(config: Config, stage: str) -> bool:
    """Does the frozen CLIP run in every step? Not where embeddings come with the data."""
    embedded = config.data.embeddings and stage in ("prior", "decoder")
    return build.STAGES[stage].needs_clip and not embedded


def trace(net: nn.Module, run: Callable[[Any], Any], device: str, autocast: bool, backward: bool = True) -> Trace:
    """Follow one step of a network of the meta device, which is used up.

    Attention is that of the device: on a GPU, torch's fused kernels; all else is traced as on a CPU.
    """
    on_gpu = patch.object(p3d, "attend", F.scaled_dot_product_attention)
    attention: AbstractContextManager[Any] = on_gpu if device == "cuda" else nullcontext()
    fast = torch.backends.mha.get_fastpath_enabled()
    gc.disable()  # so that tensors end where their last reference does, in every trace alike
    torch.backends.mha.set_fastpath_enabled(False)  # one operation without a formula
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), attention:
            net = net.to_empty(device="cpu")
            traced = Trace(net)
            with traced, torch.set_grad_enabled(backward):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    output = run(net)
                if backward:
                    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
                    sum(leaf.float().square().mean() for leaf in leaves).backward()  # type: ignore[union-attr]
                    del leaves
                del output
            for p in net.parameters():
                if p.grad is not None:
                    traced.kinds[traced.alive[p.grad.untyped_storage()._cdata]] = "gradients"
            traced.events = list(traced.events)  # what ends from here on is no part of the step
    finally:
        gc.enable()
        torch.backends.mha.set_fastpath_enabled(fast)
    return traced


def forward(config: Config, stage: str, batch: int, net: nn.Module) -> Any:
    return net(**inputs(config, stage, net, batch))


def step(config: Config, stage: str, device: str = "cuda", batch: int = 0) -> Step:
    """Trace a stage: its network for two samples and for three, and its CLIP.

    Args:
        device: where it is to train, cuda | cpu; neither need be there.
        batch: trace this batch alone, in half of the time; the result is for no other, and without CLIP's activations.
    """
    part, cast = build.section(config, stage), mixed(config, stage, device)
    traced = [
        trace(empty_network(config, stage), partial(forward, config, stage, n), device, cast)
        for n in ([batch] if batch else [2, 3])
    ]
    first, activations = traced[0], [each.bytes_of("activations") for each in traced]
    assert len({len(each) for each in activations}) == 1, "steps of two samples and of three differ in more than size"
    net = empty_network(config, stage)
    trained = [p.numel() for p in net.parameters() if p.requires_grad]
    roots = sum(trained) if device == "cuda" else 2 * max(trained)  # a CPU goes from weight to weight
    blocks = [sum(p.numel() for p in m.parameters()) for m in net.modules() if isinstance(m, BLOCKS)]
    clip = (
        [trace_clip(config, stage, n, device, cast) for n in (1, 2)] if sees_clip(config, stage) and not batch else []
    )
    most = [int(np.sum([each.bytes_of(kind) for kind in KINDS], axis=0).max()) for each in clip] or [0, 0]
    return Step(
        parameters=size(net),
        trained=sum(trained),
        block=max(blocks, default=0),
        outside=size(net) - sum(blocks),
        copies=first.bytes_of("copies"),
        outer_copies=first.bytes_of("outer copies"),
        gradients=first.bytes_of("gradients"),
        batch=batch or 2,
        activations=activations[0],
        further=activations[-1] - activations[0],
        flops=first.flops / (batch or 2),
        clip_parameters=size(empty_clip(config)) if sees_clip(config, stage) else 0,
        clip_activations=(most[0], most[1] - most[0]),
        clip_flops=float(clip[0].flops) if clip else 0.0,
        mixed=cast,
        roots=0 if part.optim.fused else roots,
    )


def bounds(config: Config, stage: str, strategy: str, shards: int) -> tuple[float, float]:
    """Bytes between which the peak of a step surely lies, without a trace.

    At least weights, gradients, AdamW and averages. At most these, CLIP, and all that the forward pass of both makes,
    alive at once, in float32, with its copies in bf16 and gradients of all.
    """
    net, batch = empty_network(config, stage), build.section(config, stage).trainer.batch_size
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    with torch.device("meta"), torch.no_grad(), Trace(net) as made:
        net(**inputs(config, stage, net, batch))
        if sees_clip(config, stage):
            clip = empty_clip(config)
            encode(clip, config, stage, batch)
    elements = sum(bytes for _, bytes in made.events if bytes > 0) / FLOAT
    fixed = FLOAT * (2 * size(net) + 3 * trained)
    return fixed / (shards if strategy == "FSDP2" else 1), 2 * fixed + 12 * elements


def trace_clip(config: Config, stage: str, batch: int, device: str, autocast: bool) -> Trace:
    """Follow the frozen CLIP over the pictures, and for the prior the captions, of a batch."""
    net = empty_clip(config)
    return trace(net, lambda clip: encode(clip, config, stage, batch), device, autocast, backward=False)


def encode(clip: Any, config: Config, stage: str, batch: int) -> None:
    """What CLIP reads of a batch."""
    part: Any = build.section(config, stage)
    model, images = config.clip.model, part.frames if getattr(part, "clip_frame", "") == "mean" else 1
    clip.encode_image(torch.zeros(batch * images, 3, model.image_size, model.image_size))
    if stage == "prior":
        clip.encode_text(torch.ones(batch, model.context_length, dtype=torch.long))


def empty_clip(config: Config) -> nn.Module:
    """The frozen CLIP without data, on the meta device."""
    with torch.device("meta"):
        return clip_network(config.clip.model, "meta").eval().requires_grad_(False)


def size(net: nn.Module) -> int:
    """Parameters of a network."""
    return sum(p.numel() for p in net.parameters())


def clip_network(model: ClipConfig, device: str = "cpu") -> nn.Module:
    """CLIP with fresh weights."""
    if not model.name:
        return build_clip(model)
    with patch.object(logging, "warning"):  # that nothing was loaded
        return open_clip.create_model(model.name, pretrained=None, device=device)


def inputs(config: Config, stage: str, net: nn.Module, batch: int) -> dict[str, Tensor]:
    """A batch as the stage's network sees it."""
    part, model = build.section(config, stage), config.clip.model
    t, width = torch.zeros(batch, dtype=torch.long), model.embedding_width
    if stage == "clip":
        tokens = torch.ones(batch, model.context_length, dtype=torch.long)
        return {"image": torch.zeros(batch, 3, model.image_size, model.image_size), "text": tokens}
    if stage == "prior":
        tokens = torch.ones(batch, config.prior.model.context_length, dtype=torch.long)
        return {"z": torch.zeros(batch, width), "t": t, "tokens": tokens, "text": torch.zeros(batch, width)}
    assert isinstance(net, UNet)
    frames = part.frames if isinstance(part, VideoStage) else 1
    if not net.temporal:  # SR_h sees the frames of clips as images
        batch, frames = batch * frames, 1
    side = build.super_resolution(config, stage).crop if stage.startswith("sr_") else config.decoder.size
    x = torch.zeros(batch, 3, frames, side, side)
    return {"x": x, "t": torch.zeros(batch), **conditions(net, x, width)}


def conditions(net: UNet, x: Tensor, width: int) -> dict[str, Tensor]:
    """Conditions of a U-Net for clips like x, `b 3 f h w`, with embeddings of `width`: their shapes are what counts."""
    batch, given = len(x), dict[str, Tensor]()
    if net.config.embedding_width:
        given["embedding"] = torch.zeros(batch, width)
    if net.config.low_res:
        given |= {"low_res": x, "noise_level": torch.zeros(batch)}
    if net.temporal:
        given["fps"] = torch.ones(batch)
    if net.masked:
        given["given"] = torch.zeros(batch, 4, *x.shape[2:])
    return given


def measured(config: Config, stage: str, batch: int, device: str) -> int:
    """The most bytes of tensors in a real step on this machine: the stage's module with fresh weights, random data,
    AdamW, clipping and averaging. On a GPU what its allocator gave out, on a CPU what torch's profiler saw."""
    part, model = build.section(config, stage), config.clip.model
    clip = Clip(clip_network(model), "untrained") if build.STAGES[stage].needs_clip else None
    net = build.network(config, stage)
    module = build.module(config, stage, net, clip).to(device)
    module.trainer = L.Trainer(accelerator=device if device == "cpu" else "gpu", devices=1, logger=False,
                               enable_checkpointing=False)  # fmt: skip
    optimizer = optimizers(net, part.optim, part.trainer.max_steps)["optimizer"]
    average = [p.detach().clone() for p in net.parameters()]
    side = max(model.image_size, 0 if stage in ("clip", "prior") else config.decoder.size)
    if stage.startswith("sr_"):
        side = build.super_resolution(config, stage).crop
    data: dict[str, Any] = {"text": ["a word"] * batch}
    if isinstance(part, VideoStage):
        data = {"fps": torch.full((batch,), 8.0, device=device)}
    shape = (batch, 3, part.frames, side, side) if isinstance(part, VideoStage) else (batch, 3, side, side)
    data["video" if isinstance(part, VideoStage) else "image"] = torch.zeros(shape, dtype=torch.uint8, device=device)
    if build.STAGES[stage].needs_clip and not sees_clip(config, stage):
        data |= {f"{of}_embedding": torch.ones(batch, model.embedding_width, device=device) for of in ("image", "text")}

    def train() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=mixed(config, stage, device)):
            loss: Tensor = module.loss(data)  # type: ignore[operator]
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in net.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in net.parameters()], 0.01)

    train()  # AdamW's moments are made in the first step
    optimizer.zero_grad()
    resident = [*net.parameters(), *average, *tree_leaves(list(optimizer.state.values()))]
    if clip is not None and sees_clip(config, stage):
        resident += clip.model.parameters()
    return peak_memory(train, sum(x.nbytes for x in resident if isinstance(x, Tensor)), device)
