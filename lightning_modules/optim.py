"""The optimiser and its schedule, one recipe for every stage."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class OptimConfig:
    """AdamW (arXiv 1711.05101) with linear warm-up; the rates of each stage are unCLIP's (appendix C)."""

    lr: float = 1.2e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 0  # steps of linear warm-up
    schedule: str = "constant"  # constant | cosine (to a tenth at the last step)
    fused: bool = False  # one kernel for all parameters; faster on a GPU


def optimizers(module: nn.Module, config: OptimConfig, max_steps: int) -> dict[str, Any]:
    """What `configure_optimizers` returns: AdamW over the parameters that train, stepped every batch."""
    if config.schedule not in ("constant", "cosine"):
        raise ValueError(f"optim.schedule '{config.schedule}' is not one of constant, cosine.")
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=config.fused,
    )

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (config.warmup + 1))
        if config.schedule == "constant":
            return warm
        done = min(1.0, step / max(1, max_steps))
        return warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
