"""Reading the frozen weights of the sites that a config names."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_func.compat import parameters_of
from lora_func.modules import find_site, whole
from lora_func.targeting import Target
from lora_func.weights import affine, check_not_computed, is_linear, is_offloaded, matrix


def frozen_weight(model: nn.Module, target: Target) -> Any:
    """Read what a variant makes the leaves of a site from.

    Args:
        model: The model.
        target: The site.

    Returns:
        The weight with its bias; or the parameters that are trained themselves, by name. Those of
        an offloaded module have data inside ``loaded`` alone.

    Raises:
        ValueError: If a weight has no data yet.
        TypeError: If a weight is not floating-point, or is computed when it is read.
    """
    module, parameter = find_site(model, target.site)
    if target.parameters:
        own = {name: whole(getattr(module, name)) for name in target.parameters}
        for tensor in own.values():
            _check_data(target.site, module, tensor)
        return own
    if parameter is None and is_linear(module):
        W = affine(module, target.site)
        if isinstance(W.weight, Tensor):
            _check_data(target.site, module, W.weight)
        return W
    name = parameter or "weight"
    check_not_computed(target.site, parameters_of(module), name)
    _check_data(target.site, module, getattr(module, name))
    return matrix(module, parameters_of(module), name)


def _check_data(site: str, module: nn.Module, weight: Tensor) -> None:
    if (weight.is_meta and not is_offloaded(module)) or is_lazy(weight):
        raise ValueError(f"{site}: its weight has no data yet; load the model first")
    if not weight.is_floating_point():
        raise TypeError(
            f"{site}: its weight is {weight.dtype}; accepted are floating-point weights"
        )


def device_of(W: Any) -> torch.device:
    """Return the device of a weight, or of the first of several parameters."""
    device = next(iter(W.values())).device if isinstance(W, Mapping) else W.device
    assert isinstance(device, torch.device)
    return device
