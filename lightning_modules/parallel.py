"""Many processes: FSDP2 through Lightning, whole tensors from split ones and back, numbers over all ranks."""

import os
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor
from torch.distributed import get_rank
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from models.prior import Block
from models.unet import Level

BLOCKS = (Level, Block, ResidualAttentionBlock)  # gathered whole one at a time


class FSDP(ModelParallelStrategy):
    """FSDP2 whose checkpoints are those of one process, so that each strategy goes on with those of the others.

    Lightning's own loading numbers the optimiser's parameters with the frozen ones, which one process does not.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = Strategy.optimizer_state(self, optimizer)
        return {**state, "state": {number: gathered(moments) for number, moments in state["state"].items()}}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        own = module.state_dict()
        state = {k: split(v, own[k]) if k in own else v for k, v in checkpoint["state_dict"].items()}
        module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {k: split(v, parameters[number]) if v.ndim else v for k, v in moments.items()}
                for number, moments in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def strategy(name: str, precision: str) -> str | Strategy:
    """Lightning's strategy of a name; `fsdp` is FSDP2.

    Raises ValueError where FSDP2 has no such precision.
    """
    if name != "fsdp":
        return name
    if precision not in ("32-true", "bf16-mixed"):
        raise ValueError(f"trainer.strategy=fsdp trains in 32-true or bf16-mixed, not in {precision}.")
    return FSDP(save_distributed_checkpoint=False)


def nodes() -> int:
    """Machines of this run, as torchrun or SLURM tell; 1 without them."""
    if TorchElasticEnvironment.detect():
        return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    return int(os.environ.get("SLURM_NNODES", 1)) if SLURMEnvironment.detect() else 1


def first_rank() -> bool:
    """Is this process the one that writes files? Known from the launcher before there is a Trainer."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def shard(module: L.LightningModule) -> None:
    """Split the network of a module under FSDP2; `configure_model` of every stage. Nothing under other strategies.

    Weights, and with them gradients, optimiser and average, are split over the GPUs of a machine and repeated on every
    machine (hybrid sharding: Lightning's mesh is machines x GPUs), so that what is gathered each step stays within one.
    """
    mesh, net = module.device_mesh, module.net
    assert isinstance(net, torch.nn.Module)
    if mesh is None or isinstance(net, FSDPModule):
        return
    net.to(memory_format=torch.contiguous_format)  # FSDP2 splits no other; activations stay channels-last
    # Autocast alone would keep a bf16 copy of every weight from forward to backward. What enters is left to autocast:
    # rounded frame rates and pixels were others. The few layers outside blocks are gathered as they are.
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = bf16 if module.trainer.precision == "bf16-mixed" else MixedPrecisionPolicy()
    for block in [m for m in net.modules() if isinstance(m, BLOCKS)]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Split again after forward, also where no backward follows: pictures are made between steps.
    fully_shard(net, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), reshard_after_forward=True)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be split; all ranks must call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they go into a file: as they are, or if split, whole and on the CPU, and on rank 0 alone.

    All ranks must call it together.
    """
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return state
    tensors = ((key, whole(tensor)) for key, tensor in state.items())  # one whole at a time
    return {key: tensor.cpu() for key, tensor in tensors if get_rank() == 0}


def split(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor, the same on every rank, placed as `like` is: on its device, and split if that is."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device, copy=True)
    part = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return part.clone()  # of its own, for a part of the whole would keep the whole in memory


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be split, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def mean_of_ranks(module: L.LightningModule, value: Tensor) -> Any:
    """The mean over all ranks at steps that are logged; at others, where it would only make ranks wait, this rank's."""
    trainer = module._trainer
    if trainer is None or trainer.world_size == 1:
        return value
    # Lightning's own answer also asks whether to stop, which ranks may learn of at different steps.
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every:
        return value
    return trainer.strategy.reduce(value.detach().clone(), reduce_op="mean")
