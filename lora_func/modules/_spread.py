"""Parameters that are spread over devices: by FSDP2, tensor parallelism, FSDP1 and ZeRO-3."""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def is_spread(tensor: object) -> bool:
    """True for a DTensor, found by its method: torch.distributed stays unimported."""
    return hasattr(tensor, "full_tensor")


def is_partitioned(tensor: object) -> bool:
    """True for a parameter of which DeepSpeed's ZeRO-3 keeps a part on each rank."""
    return hasattr(tensor, "ds_id")


def old_sharding(model: nn.Module) -> str | None:
    """Name the engine, if one shards a model that no transform of torch.func can run."""
    gathered, flattened = sharding(model)
    if flattened:
        return "FullyShardedDataParallel (FSDP1)"
    others = [module for module in model.modules() if id(module) not in gathered]
    if any(is_spread(p) for module in others for p in module.parameters(recurse=False)):
        return "tensor parallelism"
    return "DeepSpeed's ZeRO-3" if any(map(is_partitioned, model.parameters())) else None


def check_not_flattened(model: nn.Module) -> None:
    """Check that the weights of a model can be read.

    Raises:
        ValueError: If FSDP1 has flattened them.
    """
    if sharding(model).flattened:
        raise ValueError(
            f"{type(model).__name__}: FullyShardedDataParallel (FSDP1) has flattened its weights; "
            "do this before the model is wrapped, or shard it by fully_shard (FSDP2)"
        )


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whole; all devices of a DTensor must do this together.

    Args:
        tensor: Any tensor.

    Returns:
        The tensor itself if it is not spread; else a tensor without a gradient.
    """
    if not is_spread(tensor):
        return tensor
    spread: Any = tensor.detach()
    gathered: Tensor = spread.full_tensor()
    return gathered


class Sharding(NamedTuple):
    """The modules whose parameters an engine shards, and writes into the modules while they run.

    Attributes:
        gathered: The ids of those of FSDP2 (``fully_shard``).
        flattened: The ids of those of FSDP1.
    """

    gathered: frozenset[int] = frozenset()
    flattened: frozenset[int] = frozenset()


def sharding(model: nn.Module) -> Sharding:
    """Find the modules of a model that an engine shards."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or torch.compiler.is_compiling() or not torch.distributed.is_initialized():
        return Sharding()
    modules = [*model.modules()]
    return Sharding(
        *(
            frozenset(id(m) for root in modules if isinstance(root, kind) for m in root.modules())
            for kind in (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
        )
    )
