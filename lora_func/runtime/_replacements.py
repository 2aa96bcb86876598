"""Parameters that are others for a whole call, wherever they are read."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_func.runtime._frozen import Watched, frozen_parameters, shared_parameters
from lora_func.runtime._layout import Site
from lora_func.runtime._patches import Slot
from lora_func.runtime._sites import dense_parameters, effective, leaves_of


class Replacement(NamedTuple):
    """Parameters of one module that are others for a whole call.

    Attributes:
        module: The module.
        new: The new ones, by name.
        reads: The keys that reading one of them uses.
    """

    module: nn.Module
    new: dict[str, Tensor]
    reads: dict[str, set[str]]


def replacements(
    model: nn.Module, sites: Iterable[Site], params: Mapping[str, Tensor]
) -> tuple[Replacement, ...]:
    """Compute the parameters with which a model does what it does with an adapter.

    Args:
        model: The model; a parameter that several modules share is replaced in each of them, where
            the site is one that replaces it everywhere.
        sites: The sites.
        params: The adapter.

    Returns:
        What is replaced in each module.

    Raises:
        TypeError: If a variant has no weight to put there.
        ValueError: If a leaf has not its parameter's shape.
    """
    changed: dict[int, Replacement] = {}
    places = shared_parameters(model)
    for site in sites:
        module = site.module()
        assert module is not None
        own, unread = frozen_parameters(module), {*site.keys.values()}
        base = dense_parameters(site.path, module)
        leaves = leaves_of(site, params, None if torch.compiler.is_compiling() else unread)
        for name, tensor in effective(site, module, base, leaves).items():
            own_leaf = site.variant.parameters is not None
            read = {site.keys[name]} if own_leaf else {*site.keys.values()} - unread
            here = [(module, name)]
            for holder, alias in places.get(id(own[name]), here) if site.everywhere else here:
                found = changed.setdefault(id(holder), Replacement(holder, {}, {}))
                found.new[alias], found.reads[alias] = tensor, read
    return tuple(changed.values())


def parameter_slots(replaced: Iterable[Replacement], unused: set[str] | None) -> Iterator[Slot]:
    """Say what to write where for parameters that are replaced for a whole call.

    Args:
        replaced: What is replaced.
        unused: Keys, of which those are struck off that are read.

    Yields:
        Slots.
    """
    for module, new, reads in replaced:
        own = frozen_parameters(module)
        if unused is None:
            yield from ((module._parameters, name, tensor) for name, tensor in new.items())
        else:
            yield vars(module), "_parameters", Watched({**own, **new}, reads, unused, own)
