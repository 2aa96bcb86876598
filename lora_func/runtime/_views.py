"""The adapted weight, bias and parameters of a site, or of each matrix of a stack of weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.adapter import SHARED, parse
from lora_func.modules import is_spread, original_parameters, whole
from lora_func.numerics import DROPOUT
from lora_func.runtime._site import Site
from lora_func.variant import WeightFn
from lora_func.weights import (
    Affine,
    affine,
    bias_name,
    check_not_computed,
    dense,
    is_quantised,
    is_stack,
    loaded,
    matrix,
    restore_layout,
)


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


def check_no_dropout(site: Site, leaves: Mapping[str, Tensor]) -> None:
    """Check that a site whose weight is computed has no dropout, which needs its input.

    Args:
        site: The site.
        leaves: Its leaves, as ``leaves_of`` gives them.

    Raises:
        TypeError: If it has dropout and its module trains.
    """
    table = isinstance(site.module, nn.Embedding) and site.parameter == "weight"
    if DROPOUT in leaves and not table:
        raise TypeError(
            f"{site.path}: {site.variant.name} has dropout, which needs the input of a layer, and "
            f"is computed here as a weight; leave {site.keys[DROPOUT]!r} out of the adapter, or "
            "call eval() on the module"
        )


def dense_parameters(site: Site) -> dict[str, Any]:
    """Return the parameters of a site's module without an adapter: detached, dense, loaded, whole.

    Args:
        site: The site.

    Returns:
        The parameters by name; None for a missing one.
    """
    with loaded(site.module):
        own = original_parameters(site.module)
        base = {name: None if p is None else whole(p).detach() for name, p in own.items()}
        if is_quantised(site.module):
            base["weight"] = dense(affine(site.module, site.path))
        return base


def check_not_parallel(site: Site, weight: object) -> None:
    """Check that a weight lies on one device.

    Raises:
        TypeError: If it is a DTensor, as tensor parallel layers have it.
    """
    if is_spread(weight):
        raise TypeError(
            f"{site.path}: {site.variant.name} computes a weight that is tensor parallel here; "
            "there adapters take linear layers, named by target_modules"
        )


def effective_parameters(
    site: Site, own: Mapping[str, Any], leaves: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Compute the parameters with which a module does what the adapted module does.

    Args:
        site: The site.
        own: The module's own parameters.
        leaves: The site's leaves.

    Returns:
        The parameters that differ, by name.

    Raises:
        TypeError: If the variant has no weight.
        ValueError: If a leaf has another shape than its parameter.
    """
    module, name = site.module, site.parameter or "weight"
    if site.variant.parameters is not None:
        replaced = site.variant.parameters(own, leaves)
    else:
        check_not_computed(site.path, own, name)
        check_not_parallel(site, own[name])
        W = matrix(module, own, name)
        replaced = {name: restore_layout(module, own, name, adapted_weight(site, W, leaves))}
        bias = adapted_bias(site, W.bias, leaves, is_stack(W))
        if bias is not None:
            replaced[name_for_bias(site, own, name)] = bias.to(W.dtype)
    for name, tensor in replaced.items():
        if own[name] is not None and tensor.shape != own[name].shape:
            raise ValueError(
                f"{site.keys.get(name, site.path)}: got shape {tuple(tensor.shape)}, the parameter "
                f"has {tuple(own[name].shape)}; a stack goes through torch.vmap or vcall"
            )
    return replaced
