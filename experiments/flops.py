"""How much arithmetic a training step of a stage is, counted without doing it."""

from copy import deepcopy
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from experiments import build
from experiments.config import Config
from experiments.memory import empty_network, inputs


def step_flops(config: Config, stage: str) -> int:
    """Floating point operations of one step of one rank: forward and backward of the stage's network on its batches.

    Model FLOPs: what activation checkpointing computes twice is counted once. Matrix products, attention and
    convolutions count, a multiplication and an addition as two; the frozen CLIP, the optimiser and what is done value
    by value do not. The network and its batch are on the meta device, so nothing is computed.
    """
    config = deepcopy(config)
    part: Any = build.section(config, stage)
    samples = part.trainer.batch_size * part.trainer.accumulate
    for image in (config.decoder, config.sr_low, config.sr_high):
        image.unet.checkpoint_activations = False
    net = empty_network(config, stage)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        leaves = tree_leaves(net(**inputs(config, stage, net, 1)))
        torch.stack([leaf.float().square().mean() for leaf in leaves]).sum().backward()
    return counter.get_total_flops() * samples  # every operation is of one sample, so they add up
