"""Data parallelism without a module: gradients are averaged over the ranks."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lora_func.adapter import partition
from lora_func.variant import Params


def synced(params: Mapping[str, Tensor], group: Any = None) -> Params:
    """Return an adapter whose gradients are the average over the ranks.

    It is the identity, and its backward pass averages. So each rank calls ``fcall(model,
    synced(params), its_batch)`` or a ``vcall``, and gets the gradient of the mean of the losses.
    All ranks must hold equal leaves, and take the same calls in the same order.

    Args:
        params: An adapter, or a stack; the same on all ranks.
        group: The ranks; None for all.

    Returns:
        The same values under the same keys.

    Raises:
        RuntimeError: If torch.distributed is not initialised.
        KeyError: If a key is no adapter key.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "synced: torch.distributed is not initialised; start the ranks with torchrun, and call "
            "torch.distributed.init_process_group"
        )
    trained, _ = partition(params)
    trained = {key: leaf for key, leaf in trained.items() if leaf.requires_grad}
    if not trained:
        return {**params}
    leaves = _Synced.apply(group, *trained.values())  # type: ignore[no-untyped-call]
    return {**params, **dict(zip(trained, leaves, strict=True))}


class _Synced(torch.autograd.Function):
    """The identity; its backward pass averages, all gradients together."""

    @staticmethod
    def forward(group: Any, *leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.group = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *_Average.apply(ctx.group, *gradients)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], group: Any, *leaves: Tensor) -> tuple[Any, Any]:
        return _Synced.apply(group, *leaves), in_dims[1:]  # type: ignore[no-untyped-call]


class _Average(torch.autograd.Function):
    """The average over the ranks; so is its derivative."""

    @staticmethod
    def forward(group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        averaged: list[Tensor | None] = [None] * len(tensors)
        for kind in {(t.dtype, t.device): None for t in tensors}:
            places = [i for i, t in enumerate(tensors) if (t.dtype, t.device) == kind]
            flat = torch.cat([tensors[i].reshape(-1) for i in places])
            dist.all_reduce(flat, group=group)
            flat /= dist.get_world_size(group)
            sizes = [tensors[i].numel() for i in places]
            for i, part in zip(places, torch.split(flat, sizes), strict=True):
                averaged[i] = part.view(tensors[i].shape)
        return tuple(part for part in averaged if part is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.group = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *_Average.apply(ctx.group, *gradients)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], group: Any, *tensors: Tensor) -> tuple[Any, Any]:
        return _Average.apply(group, *tensors), in_dims[1:]  # type: ignore[no-untyped-call]
