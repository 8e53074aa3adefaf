"""`trainer=fsdp`: each device holds a part of weights, gradients and optimizer state (FSDP2)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from graft.training.module import TransferModule


class ShardedStrategy(DDPStrategy):
    """Shards each block of the backbone, and the head, for the time of a fit.

    A block's weights are gathered when it runs and dropped after it. Checkpoints hold whole
    tensors under the usual keys, and after the fit so does the module: what comes next (the best
    weights, a test, another stage) sees nothing of it. Lightning's FSDPStrategy is for GPUs alone,
    and its ModelParallelStrategy leaves the module in parts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.whole: list[tuple[nn.Module, str, nn.Module]] = []  # parent, name, a block's stand-in

    def configure_ddp(self) -> None:
        """In place of the wrapping: the module is still plain and the same on every rank."""
        module = cast("TransferModule", self.lightning_module)
        if any(p.requires_grad for p in module.task.parameters()):
            raise ValueError(
                "trainer=fsdp: the task has weights of its own, which would not be shared between "
                "devices: use trainer=ddp"
            )
        mesh = init_device_mesh(self.root_device.type, (dist.get_world_size(),))
        blocks = [(module.backbone.blocks, name) for name in module.backbone.learnable_blocks]
        for parent, name in [*blocks, (module, "head")]:
            unit = parent.get_submodule(name)
            self.whole.append((parent, name, without_weights(unit)))
            unit.to(memory_format=torch.contiguous_format)  # FSDP knows no other
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)

    def on_train_end(self) -> None:
        """Here rather than in `teardown`, which a rank that fails comes to alone."""
        for parent, name, whole in self.whole:
            whole.load_state_dict(gathered(parent.get_submodule(name).state_dict()))
            setattr(parent, name, whole.to(self.root_device))
        self.whole.clear()
        self._reset_optimizers_and_schedulers()  # they know the shards

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return gathered(super().lightning_module_state_dict(), keep=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return gathered(super().optimizer_state(optimizer), keep=self.is_global_zero)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                i: {key: sharded_like(parameters[i], value) for key, value in values.items()}
                for i, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def without_weights(module: nn.Module) -> nn.Module:
    """A copy on the CPU whose parameters are allocated and never written: they take no memory."""
    memo = {
        id(p): nn.Parameter(torch.empty_like(p, device="cpu"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, memo)


def gathered(state: dict[str, Any], *, keep: bool = True) -> dict[str, Any]:
    """Whole tensors on the CPU in place of shards, where `keep`; all ranks must call it."""

    def whole(shard: DTensor) -> Tensor | None:
        full = shard.full_tensor()
        return full.cpu() if keep else None

    return apply_to_collection(state, DTensor, whole)


def sharded_like(parameter: DTensor, value: Any) -> Any:
    """A whole tensor of the parameter's shape in parts; anything else, like a count, as it is."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
