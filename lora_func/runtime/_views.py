"""The weight and the bias of a site, or of each of a stack of weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_func.adapter._keys import SHARED, parse
from lora_func.runtime._frozen import Watched
from lora_func.runtime._layout import Site
from lora_func.variant import WeightFn
from lora_func.weights._layers import Affine, dense, is_stack


def weight_view(site: Site) -> WeightFn:
    """Return the function that gives a site's adapted weight.

    Raises:
        TypeError: If the variant has none.
    """
    if site.variant.weight is None:
        raise TypeError(
            f"{site.path}: {site.variant.name} is not linear in x and has no weight; run the model "
            "in a block of `with adapted(model, params)`"
        )
    return site.variant.weight


def new_weight(site: Site, W: Affine, leaves: Mapping[str, Tensor]) -> Tensor:
    """Return the adapted weight, or stack of them.

    Args:
        site: The site.
        W: Its weight, as ``matrix`` reads it.
        leaves: The site's leaves.

    Returns:
        The same shape.

    Raises:
        TypeError: If the variant has no weight.
    """
    view, stacked = weight_view(site), is_stack(W)

    def weight(own: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
        return view(Affine(weight, bias), own)

    changed: Tensor = _of_each(site, weight, stacked, leaves, dense(W), W.bias)
    return changed


def new_bias(
    site: Site, bias: Tensor | None, leaves: Mapping[str, Tensor], stacked: bool
) -> Tensor | None:
    """Return the bias where the variant changes it.

    Args:
        site: The site.
        bias: Its bias, if it has one.
        leaves: The site's leaves.
        stacked: Whether it is a stack of them.

    Returns:
        The adapted bias, or stack of them; None for the one that was.
    """
    if site.variant.bias is None:
        return None
    view = site.variant.bias

    def changed(own: Mapping[str, Tensor], bias: Tensor | None) -> tuple[Tensor, ...]:
        new = view(bias, own)
        return () if new is None else (new,)

    return next(iter(_of_each(site, changed, stacked, leaves, bias)), None)


def _of_each(
    site: Site,
    view: Callable[..., Any],
    stacked: bool,
    leaves: Mapping[str, Tensor],
    *tensors: Tensor | None,
) -> Any:
    """Call a view for a site's weight, or for each of a stack of them."""

    def watched(own: Mapping[str, Tensor], *tensors: Tensor | None) -> Any:
        return view(leaves.over(own) if isinstance(leaves, Watched) else own, *tensors)

    if not stacked:
        return watched(dict(leaves), *tensors)
    shared = {leaf for leaf, key in site.keys.items() if parse(key).site == SHARED}
    dims = {leaf: None if leaf in shared else 0 for leaf in leaves}
    axes = [None if tensor is None else 0 for tensor in tensors]
    return torch.vmap(watched, in_dims=(dims, *axes))(dict(leaves), *tensors)
