"""How an adapted site computes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_func._frozen import Forward, Watched, frozen_parameters, shared_parameters
from lora_func._keys import SHARED, parse
from lora_func._packed import is_quantised
from lora_func._plan import Site
from lora_func._slots import Put, Slot
from lora_func._weight import Affine, affine, bias_name, dense, is_stack, matrix, stored


def leaves_of(
    site: Site, params: Mapping[str, Tensor], unused: set[str] | None = None
) -> Mapping[str, Tensor]:
    """Return the leaves of a site, its constants detached.

    Args:
        site: The site.
        params: The adapter.
        unused: Keys, of which those are struck off that are read.
    """
    leaves = {
        leaf: params[key].detach() if leaf.startswith("_") else params[key]
        for leaf, key in site.keys.items()
    }
    if unused is None:
        return leaves
    return Watched(leaves, site.reads, unused)


def run_sites(
    sites: Sequence[Site],
    module: nn.Module,
    frozen: Forward,
    leaves: Sequence[Mapping[str, Tensor]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a module with one adapter.

    Args:
        sites: The module's sites: one, or several of which each has parameters of its own.
        module: The module.
        frozen: The module's own forward.
        leaves: The leaves of each site.
        *args: What the module was called with.
        **kwargs: The same.

    Returns:
        What the adapted module gives.
    """
    if runs_apply(sites, module):
        (x,), (site,) = (*args, *kwargs.values()), sites
        return site.variant.apply(affine(module), leaves[0], x)
    own: Any = module._parameters
    replaced: dict[str, Tensor] = {}
    for site, of_it in zip(sites, leaves, strict=True):
        replaced |= effective(site, module, own, of_it)
    with Put((own, name, tensor) for name, tensor in replaced.items()):
        return frozen(*args, **kwargs)


def runs_apply(sites: Sequence[Site], module: nn.Module) -> bool:
    """Tell whether a variant's ``apply`` does what the adapted module does."""
    (site, *more) = sites
    own = site.variant.parameters is None or type(module) is nn.Linear
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
        base = {name: None if p is None else p.detach() for name, p in own.items()}
        if is_quantised(module):
            base["weight"] = dense(affine(module))
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
        if site.variant.weight is None:
            raise TypeError(
                f"{site.path}: {site.variant.name} is not linear in x and has no weight; run the "
                "model in a block of `with adapted(model, params)`"
            )
        weight, bias = _views(site, matrix(module, own, name), leaves)
        replaced = {name: stored(module, own, name, weight)}
        if bias is not None:
            replaced[_place_for_bias(site, own, name)] = bias
    for name, tensor in replaced.items():
        if own[name] is not None and tensor.shape != own[name].shape:
            raise ValueError(
                f"{site.keys.get(name, site.path)}: got shape {tuple(tensor.shape)}, the parameter "
                f"has {tuple(own[name].shape)}; a stack goes through torch.vmap or vcall"
            )
    return replaced


def _views(site: Site, W: Affine, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The adapted weight, or stack of them, and the bias where the variant changes it."""
    variant = site.variant

    def views(weight: Tensor, bias: Tensor | None, own: Mapping[str, Tensor]) -> Any:
        assert variant.weight is not None
        own = leaves.over(own) if isinstance(leaves, Watched) else own
        new = None if variant.bias is None else variant.bias(bias, own)
        changed = variant.weight(Affine(weight, bias), own)
        return (changed,) if new is None else (changed, new.to(changed.dtype))

    if is_stack(W):
        shared = {leaf for leaf, key in site.keys.items() if parse(key).site == SHARED}
        dims = {leaf: None if leaf in shared else 0 for leaf in leaves}
        views = torch.vmap(views, in_dims=(0, None if W.bias is None else 0, dims))
    new_weight, *new_bias = views(dense(W), W.bias, dict(leaves))
    return new_weight, new_bias[0] if new_bias else None


def _place_for_bias(site: Site, own: Mapping[str, Tensor], name: str) -> str:
    beside = bias_name(own, name)
    if beside is None:
        raise TypeError(
            f"{site.path}: {site.variant.name} gives it a bias, for which its module has no place"
        )
    return beside
