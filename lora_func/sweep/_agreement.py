"""A sharded base under a sweep: every rank makes the same number of forward passes.

Each pass of a model that FSDP2 shards gathers its weights, in which all ranks take part. Ranks may
hold different numbers of adapters, so they agree on the largest number of passes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_func.compat import tree_flatten, tree_unflatten
from lora_func.modules import is_spread, sharding
from lora_func.runtime import tensors_of


def is_sharded(model: nn.Module) -> bool:
    """True if FSDP2 shards modules of a model."""
    return bool(sharding(model).gathered)


def largest(model: nn.Module, number: int) -> int:
    """Return the largest of the ranks' numbers; without a sharded model the number itself.

    Args:
        model: The model.
        number: What this rank would do.

    Returns:
        What the rank with the most does.
    """
    if not is_sharded(model):
        return number
    spread: Any = next((p for p in model.parameters() if is_spread(p)), None)
    mesh = None if spread is None else spread.device_mesh
    device = "cpu" if mesh is None else mesh.device_type
    found = torch.tensor(number, device=device)
    groups = [None] if mesh is None else [mesh.get_group(i) for i in range(mesh.ndim)]
    for group in groups:
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return int(found.item())


def beside(result: Any, other: Any) -> Any:
    """Give a result a second past, whose backward pass runs as well and gets zeros.

    Args:
        result: A tree of tensors.
        other: Another one.

    Returns:
        The values of the result.
    """
    leaves, layout = tree_flatten(result)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    others = [tensor for tensor in tensors_of(other) if tensor.requires_grad]
    if places and others:
        leaves[places[0]] = _Beside.apply(leaves[places[0]], *others)  # type: ignore[no-untyped-call]
    return tree_unflatten(leaves, layout)


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(result: Tensor, *others: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.likes = [(other.shape, other.dtype) for other in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(gradient.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.likes)
