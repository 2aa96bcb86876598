"""Preparing leaves: what depends on the leaves alone, for many sites at once."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_func.compat import transformed
from lora_func.variant._protocols import PrepareFn
from lora_func.variant._variant import Variant
from lora_func.weights import Weight

Leaves = dict[str, Tensor]


def prepare_sites(
    variant: Variant,
    sites: Sequence[Leaves],
    shared: Container[str],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> list[Leaves]:
    """Prepare the leaves of sites whose leaves have the same names, shapes and dtypes.

    Args:
        variant: Their variant.
        sites: The leaves of each site, possibly with an axis of adapters in front.
        shared: The leaves that all the sites have in common.
        shape: (d_out, d_in) of their weights.
        dtype: The dtype of the activations.

    Returns:
        What ``apply`` takes at each site: its leaves, and what was prepared from them.

    Raises:
        ValueError: If ``prepare`` gives a tensor without the axis of the sites.
    """
    used: set[int] = set()

    def together(leaf: str) -> Tensor:
        if len(sites) == 1 or leaf in shared:
            return sites[0][leaf][None]
        return _joined([site[leaf] for site in sites], used)

    ready = [{**site} for site in sites]
    for leaf in variant.casts:
        if leaf in sites[0] and sites[0][leaf].dtype != dtype:
            _hand_out(leaf, together(leaf).to(dtype), ready, used)
    if variant.prepare is not None:
        own = {leaf: together(leaf) for leaf in sites[0] if leaf not in variant.casts}
        for name, tensor in variant.prepare(own, shape, dtype).items():
            _hand_out(name, tensor, ready, used)
    return ready


def _hand_out(name: str, tensor: Tensor, ready: Sequence[Leaves], used: set[int]) -> None:
    """Give each site its part of a tensor."""
    count = len(ready)
    if not isinstance(tensor, Tensor) or not tensor.ndim or tensor.shape[0] not in (1, count):
        found = tuple(tensor.shape) if isinstance(tensor, Tensor) else tensor
        raise ValueError(
            f"prepare: {name!r} has shape {found}; it needs an axis of {count} sites in front, or "
            "of 1"
        )
    parts = _parts(tensor, used) if tensor.shape[0] == count else (tensor[0],) * count
    for own, part in zip(ready, parts, strict=True):
        own[name] = part


def _joined(leaves: Sequence[Tensor], used: set[int]) -> Tensor:
    """Stack leaves; those of which autograd uses no part get no gradient, in place of zeros."""
    if not _records(leaves):
        return torch.stack([*leaves])
    joined: Tensor = _Join.apply(used, *leaves)  # type: ignore[no-untyped-call]
    return joined


def _parts(tensor: Tensor, used: set[int]) -> Sequence[Tensor]:
    """Unbind a tensor, and note which parts autograd uses."""
    if not _records([tensor]):
        return tensor.unbind()
    parts: Sequence[Tensor] = _Part.apply(used, tensor)  # type: ignore[no-untyped-call]
    return parts


def _records(tensors: Sequence[Tensor]) -> bool:
    """True if autograd alone records what happens: a transform gives zeros in any case."""
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return recorded and not torch.compiler.is_compiling() and not transformed()


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, used: set[int], *leaves: Tensor) -> Tensor:
        ctx.used = used
        return torch.stack(leaves)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        each = enumerate(gradient.unbind())
        return None, *(part if i in ctx.used else None for i, part in each)


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, used: set[int], tensor: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.used, ctx.like = used, tensor[0].detach()
        return tuple(part.view_as(part) for part in tensor.unbind())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, Tensor | None]:
        ctx.used.update(i for i, gradient in enumerate(gradients) if gradient is not None)
        missing = any(gradient is None for gradient in gradients)
        zeros = torch.zeros_like(ctx.like) if missing else None
        each = [zeros if gradient is None else gradient for gradient in gradients]
        return None, torch.stack([one for one in each if one is not None])


def prepared(
    prepare: PrepareFn, params: Mapping[str, Tensor], W: Weight, dtype: torch.dtype
) -> Leaves:
    """Prepare the leaves of one site, for an ``apply`` that is called with the leaves alone.

    Args:
        prepare: The variant's ``prepare``.
        params: The leaves.
        W: The site's weight.
        dtype: The dtype of the activations.

    Returns:
        The leaves, and what was prepared from them.
    """
    d_out, d_in = W.shape
    found = prepare({leaf: tensor[None] for leaf, tensor in params.items()}, (d_out, d_in), dtype)
    return {**params, **{name: tensor.squeeze(0) for name, tensor in found.items()}}
