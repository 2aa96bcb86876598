"""How an adapted site computes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_func._bitsandbytes import is_quantised
from lora_func._frozen import Forward, Watched, frozen_parameters, shared_parameters
from lora_func._plan import Site
from lora_func._slots import Put, Slot
from lora_func._views import new_bias, new_weight
from lora_func._weight import affine, bias_name, dense, is_stack, matrix, refuse_computed, stored


def leaves_of(
    site: Site, params: Mapping[str, Tensor], unused: set[str] | None = None
) -> Mapping[str, Tensor]:
    """Return the leaves of a site, its constants detached.

    Args:
        site: The site.
        params: The adapter.
        unused: Keys, of which those are struck off that are read.
    """
    leaves = {leaf: params[key] for leaf, key in site.keys.items()}
    for leaf in leaves:
        if leaf[0] == "_":
            leaves[leaf] = leaves[leaf].detach()
    if unused is None:
        return leaves
    return Watched(leaves, site.reads, unused)


def run_sites(
    sites: Sequence[Site],
    module: nn.Module,
    leaves: Sequence[Mapping[str, Tensor]],
    frozen: Forward,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a module with one adapter.

    Args:
        sites: The module's sites: one, or several of which each has parameters of its own.
        module: The module.
        leaves: The leaves of each site.
        frozen: The module's own forward.
        *args: What the module was called with.
        **kwargs: The same.

    Returns:
        What the adapted module gives.
    """
    if runs_apply(sites, module):
        (x,), (site,) = (*args, *kwargs.values()), sites
        return site.variant.apply(affine(module, site.path), leaves[0], x)
    own: Any = module._parameters
    replaced: dict[str, Tensor] = {}
    for site, of_it in zip(sites, leaves, strict=True):
        replaced |= effective(site, module, own, of_it)
    with Put((own, name, tensor) for name, tensor in replaced.items()):
        return frozen(*args, **kwargs)


class Solo:
    """Runs a module with one adapter; an object, since the compiler writes into no loose set.

    Attributes:
        sites: The module's sites.
        module: The module.
        params: The adapter.
        unused: Its keys, of which those are struck off that are read.
    """

    __slots__ = ("module", "params", "sites", "unused")

    def __init__(
        self,
        sites: Sequence[Site],
        module: nn.Module,
        params: Mapping[str, Tensor],
        unused: set[str] | None,
    ) -> None:
        self.sites = sites
        self.module = module
        self.params = params
        self.unused = unused

    def __call__(self, frozen: Forward, *args: Any, **kwargs: Any) -> Any:
        leaves = [leaves_of(site, self.params, self.unused) for site in self.sites]
        return run_sites(self.sites, self.module, leaves, frozen, *args, **kwargs)


def runs_apply(sites: Sequence[Site], module: nn.Module) -> bool:
    """Tell whether a variant's ``apply`` does what the adapted module does."""
    (site, *more) = sites
    plain = type(module) is nn.Linear or is_quantised(module)
    own = site.variant.parameters is None or plain
    return site.parameter is None and own and not more


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


def dense_parameters(path: str, module: nn.Module) -> dict[str, Any]:
    """Return a module's own parameters, detached, and dequantised if they are quantised.

    Args:
        path: Its path, for messages.
        module: The module.

    Returns:
        The parameters by name; None for what it has not.
    """
    own = frozen_parameters(module)
    base = {name: None if p is None else p.detach() for name, p in own.items()}
    if is_quantised(module):
        base["weight"] = dense(affine(module, path))
    return base


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


def effective(
    site: Site, module: nn.Module, own: Mapping[str, Any], leaves: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the parameters with which a module computes what the adapted one does.

    Args:
        site: The site.
        module: Its module.
        own: The module's own parameters.
        leaves: The site's leaves.

    Returns:
        The parameters that differ, by name.

    Raises:
        TypeError: If the variant has no weight to put there.
        ValueError: If a leaf has not its parameter's shape.
    """
    name = site.parameter or "weight"
    if site.variant.parameters is not None:
        replaced = site.variant.parameters(own, leaves)
    else:
        refuse_computed(site.path, own, name)
        W = matrix(module, own, name)
        replaced = {name: stored(module, own, name, new_weight(site, W, leaves))}
        bias = new_bias(site, W.bias, leaves, is_stack(W))
        if bias is not None:
            replaced[place_for_bias(site, own, name)] = bias.to(W.dtype)
    for name, tensor in replaced.items():
        if own[name] is not None and tensor.shape != own[name].shape:
            raise ValueError(
                f"{site.keys.get(name, site.path)}: got shape {tuple(tensor.shape)}, the parameter "
                f"has {tuple(own[name].shape)}; a stack goes through torch.vmap or vcall"
            )
    return replaced


def place_for_bias(site: Site, own: Mapping[str, Any], name: str) -> str:
    """Name the parameter, possibly None, into which a variant puts its bias.

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
            f"{site.path}: {site.variant.name} gives it a bias, for which its module has no place"
        )
    return beside
