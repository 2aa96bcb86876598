"""Preparing leaves: what depends on the leaves alone, for many sites at once."""

from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor

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

    def together(leaf: str) -> Tensor:
        if len(sites) == 1 or leaf in shared:
            return sites[0][leaf][None]
        return torch.stack([site[leaf] for site in sites])

    ready = [{**site} for site in sites]
    for leaf in variant.casts:
        if leaf in sites[0] and sites[0][leaf].dtype != dtype:
            _hand_out(leaf, together(leaf).to(dtype), ready)
    if variant.prepare is not None:
        own = {leaf: together(leaf) for leaf in sites[0] if leaf not in variant.casts}
        for name, tensor in variant.prepare(own, shape, dtype).items():
            _hand_out(name, tensor, ready)
    return ready


def _hand_out(name: str, tensor: Tensor, ready: Sequence[Leaves]) -> None:
    """Give each site its part of a tensor."""
    count = len(ready)
    if not tensor.ndim or tensor.shape[0] not in (1, count):
        raise ValueError(
            f"prepare: {name!r} has shape {tuple(tensor.shape)}; it needs an axis of {count} sites "
            "in front, or of 1"
        )
    parts = tensor.unbind() if tensor.shape[0] == count else (tensor[0],) * count
    for own, part in zip(ready, parts, strict=True):
        own[name] = part


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
