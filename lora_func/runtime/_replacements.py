"""Parameters that are replaced for a whole call, wherever they are read."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from lora_func.modules import original_parameters, sharding, shared_parameters
from lora_func.runtime._layout import ModelLayout
from lora_func.runtime._leaves import leaves_of
from lora_func.runtime._site import Site
from lora_func.runtime._views import (
    check_no_dropout,
    check_not_parallel,
    dense_parameters,
    effective_parameters,
)


class Replacement(NamedTuple):
    """Parameters of one module that are replaced for a whole call.

    Attributes:
        module: The module.
        new: The new parameters, by name.
        keys: Name -> the keys of the adapter that reading the parameter uses.
    """

    module: nn.Module
    new: dict[str, Tensor]
    keys: dict[str, tuple[str, ...]]


def replacements(
    model: nn.Module, sites: Iterable[Site], params: Mapping[str, Tensor]
) -> tuple[Replacement, ...]:
    """Compute the parameters with which a model does what it does with an adapter.

    Args:
        model: The model. A parameter that several modules share is replaced in each of them, if the
            site replaces it everywhere.
        sites: The sites.
        params: The adapter.

    Returns:
        What is replaced in each module.

    Raises:
        TypeError: If a variant has no weight.
        ValueError: If a leaf has another shape than its parameter.
    """
    changed: dict[int, Replacement] = {}
    gathered = sharding(model).gathered
    places = shared_parameters(model)
    for site in sites:
        module, replaces = site.module, site.variant.parameters is not None
        # whoever replaces a parameter needs none of its values
        own = original_parameters(module) if replaces else dense_parameters(site)
        if replaces and id(module) not in gathered:
            for name in site.keys:
                check_not_parallel(site, own[name])
        new = effective_parameters(site, own, leaves_of(site, params))
        for name, tensor in new.items():
            keys = (site.keys[name],) if replaces else site.known
            here = [(module, name)]
            for holder, alias in places.get((module, name), here) if site.everywhere else here:
                found = changed.setdefault(id(holder), Replacement(holder, {}, {}))
                found.new[alias], found.keys[alias] = tensor, keys
    return tuple(changed.values())


def replaced_for_call(
    model: nn.Module, layout: ModelLayout, params: Mapping[str, Tensor]
) -> tuple[Replacement, ...]:
    """Compute the parameters that are replaced for a whole call with one adapter.

    Args:
        model: The model.
        layout: The layout of the adapter.
        params: The adapter.

    Returns:
        What is replaced in each module; nothing if all sites act in their own modules.

    Raises:
        TypeError: If a variant has no weight, or a site has dropout.
        ValueError: If a leaf has another shape than its parameter.
    """
    everywhere = [site for site in layout.sites if site.everywhere]
    for site in everywhere:
        check_no_dropout(site, leaves_of(site, params))
    return replacements(model, everywhere, params) if everywhere else ()
