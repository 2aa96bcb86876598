"""The adapted weight and bias of a site, or of each matrix of a stack of weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_func.adapter import SHARED, parse
from lora_func.runtime._site import Site
from lora_func.variant import WeightFn
from lora_func.weights import Affine, bias_name, dense, is_stack


def weight_view(site: Site) -> WeightFn:
    """Return the function that computes a site's adapted weight.

    Raises:
        TypeError: If the variant has none.
    """
    if site.variant.weight is None:
        raise TypeError(
            f"{site.path}: {site.variant.name} is not linear in x and has no weight; run the model "
            "in a block of `with adapted(model, params)`"
        )
    return site.variant.weight


def adapted_weight(site: Site, W: Affine, leaves: Mapping[str, Tensor]) -> Tensor:
    """Compute the adapted weight, or stack of weights.

    Args:
        site: The site.
        W: Its weight, as ``matrix`` reads it.
        leaves: The site's leaves.

    Returns:
        The shape of W.

    Raises:
        TypeError: If the variant has no weight.
    """
    view = weight_view(site)

    def weight(own: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
        return view(Affine(weight, bias), own)

    changed: Tensor = _of_each(site, weight, is_stack(W), leaves, dense(W), W.bias)
    return changed


def adapted_bias(
    site: Site, bias: Tensor | None, leaves: Mapping[str, Tensor], stacked: bool
) -> Tensor | None:
    """Compute the adapted bias, or stack of biases.

    Args:
        site: The site.
        bias: Its bias, if it has one.
        leaves: The site's leaves.
        stacked: Whether the site is a stack of weights.

    Returns:
        The adapted bias; None if it stays as it is.
    """
    if site.variant.bias is None:
        return None
    view = site.variant.bias

    def changed(own: Mapping[str, Tensor], bias: Tensor | None) -> tuple[Tensor, ...]:
        new = view(bias, own)
        return () if new is None else (new,)

    return next(iter(_of_each(site, changed, stacked, leaves, bias)), None)


def name_for_bias(site: Site, own: Mapping[str, Any], name: str) -> str:
    """Name the parameter, possibly None, that an adapted bias replaces.

    Args:
        site: The site.
        own: The parameters of its module.
        name: The parameter that is its weight.

    Returns:
        The name.

    Raises:
        TypeError: If the module has none.
    """
    beside = bias_name(own, name)
    if beside is None:
        raise TypeError(
            f"{site.path}: {site.variant.name} adds a bias, and its module has no place for one"
        )
    return beside


def _of_each(
    site: Site,
    view: Callable[..., Any],
    stacked: bool,
    leaves: Mapping[str, Tensor],
    *tensors: Tensor | None,
) -> Any:
    """Call a view for a site's weight, or for each matrix of a stack."""
    if not stacked:
        return view(leaves, *tensors)
    shared = {leaf for leaf, key in site.keys.items() if parse(key).site == SHARED}
    dims = {leaf: None if leaf in shared else 0 for leaf in leaves}
    axes = [None if tensor is None else 0 for tensor in tensors]
    return torch.vmap(view, in_dims=(dims, *axes))(dict(leaves), *tensors)
