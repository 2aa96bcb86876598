"""A sharded base under a sweep: every rank makes the same number of passes, in both directions.

Ranks may hold different numbers of adapters. They agree on the largest number of passes, and one
with fewer repeats its last one, with gradients of zeros.
"""

from typing import Any

import torch
from torch import Tensor

from lora_func.compat import tree_flatten, tree_unflatten
from lora_func.runtime import tensors_of


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
