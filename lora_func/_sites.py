"""How an adapted site computes, and what its module has without an adapter."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lora_func._keys import SHARED, parse
from lora_func._modules import forward_slot
from lora_func._plan import Site
from lora_func._slots import Put, Slot
from lora_func._weight import Affine, affine, bias_name, matrix, stored

Forward: TypeAlias = Callable[..., Any]

FROZEN = "_lora_func_frozen"
"""Where a forward of ours keeps the one whose place it takes."""


class Watched(dict[str, Tensor]):
    """A dict that strikes what is read from it off a list.

    Attributes:
        frozen: The dict whose place it takes, if it takes one's.
    """

    __slots__ = ("_keys", "_unused", "frozen")

    def __init__(
        self,
        values: Mapping[str, Tensor],
        keys: Mapping[str, Collection[str]],
        unused: set[str],
        frozen: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(values)
        self._keys = keys
        self._unused = unused
        self.frozen = frozen

    def __getitem__(self, name: str) -> Tensor:
        self._unused.difference_update(self._keys.get(name, ()))
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._unused.difference_update(self._keys.get(name, ()))
        return super().get(name, default)

    def __reduce__(self) -> tuple[type[dict[str, Tensor]], tuple[dict[str, Tensor]]]:
        return dict, (dict(self),)


def frozen_forward(module: nn.Module) -> Forward:
    """Return what a module runs without an adapter."""
    found: Forward = getattr(module, forward_slot(module))
    return getattr(found, FROZEN, found)


def frozen_parameters(module: nn.Module) -> Mapping[str, Tensor]:
    """Return a module's parameters as they are without an adapter."""
    own: Any = module._parameters
    frozen: Mapping[str, Tensor] | None = getattr(own, "frozen", None)
    return own if frozen is None else frozen


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
    return Watched(leaves, {leaf: (key,) for leaf, key in site.keys.items()}, unused)


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
        replaced |= _effective(site, module, own, of_it)
    with Put((own, name, tensor) for name, tensor in replaced.items()):
        return frozen(*args, **kwargs)


def runs_apply(sites: Sequence[Site], module: nn.Module) -> bool:
    """Tell whether a variant's ``apply`` does what the adapted module does."""
    (site, *more) = sites
    own = site.variant.parameters is None or type(module) is nn.Linear
    return site.parameter is None and own and not more


def parameter_slots(
    model: nn.Module,
    sites: Iterable[Site],
    params: Mapping[str, Tensor],
    unused: set[str] | None,
) -> Iterator[Slot]:
    """Say what to write where for parameters that are replaced for a whole call.

    Args:
        model: The model; a parameter that several modules share is replaced in each of them.
        sites: The sites, as far as they replace parameters everywhere.
        params: The adapter.
        unused: Keys, of which those are struck off that are read.

    Yields:
        Slots.
    """
    changed: dict[int, tuple[nn.Module, dict[str, Tensor], dict[str, set[str]]]] = {}
    places = shared_parameters(model)
    for site in sites:
        module = site.module()
        assert module is not None
        own, unread = frozen_parameters(module), {*site.keys.values()}
        leaves = leaves_of(site, params, None if unused is None else unread)
        for name, tensor in _effective(site, module, own, leaves).items():
            read = {site.keys[name]} if name in site.keys else {*site.keys.values()} - unread
            for holder, alias in places.get(id(own[name]), [(module, name)]):
                _, new, reads = changed.setdefault(id(holder), (holder, {}, {}))
                new[alias], reads[alias] = tensor, read
    for holder, new, reads in changed.values():
        own = frozen_parameters(holder)
        if unused is None:
            yield from ((holder._parameters, name, tensor) for name, tensor in new.items())
        else:
            yield vars(holder), "_parameters", Watched({**own, **new}, reads, unused, own)


def replaced_ids(sites: Iterable[Site]) -> set[int]:
    """Return the ids of the parameters that are replaced for a whole call."""
    ids = set()
    for site in sites:
        module = site.module()
        assert module is not None
        own = frozen_parameters(module)
        names = {*site.keys} if site.parameter is None else {site.parameter}
        if site.parameter is not None and site.variant.bias is not None:
            names |= {bias_name(own, site.parameter) or site.parameter}
        ids |= {id(own[name]) for name in names}
    return ids


def shared_parameters(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return the places, module and name, of each parameter of a model, by its id."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in frozen_parameters(module).items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return places


def _effective(
    site: Site, module: nn.Module, own: Mapping[str, Tensor], leaves: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The parameters with which a module computes what the adapted one does, by name."""
    name = site.parameter
    if name is None:
        assert site.variant.parameters is not None
        replaced = site.variant.parameters(own, leaves)
    else:
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

    def views(weight: Tensor, bias: Tensor | None, leaves: Mapping[str, Tensor]) -> Any:
        assert variant.weight is not None
        new = None if variant.bias is None else variant.bias(bias, leaves)
        both = (variant.weight(Affine(weight, bias), leaves), new)
        return both if new is not None else both[:1]

    weight, bias = W.weight.detach(), None if W.bias is None else W.bias.detach()
    if weight.ndim == 3:
        shared = {leaf for leaf, key in site.keys.items() if parse(key).site == SHARED}
        dims = {leaf: None if leaf in shared else 0 for leaf in leaves}
        leaves = {leaf: leaves[leaf] for leaf in leaves}
        views = torch.vmap(views, in_dims=(0, None if bias is None else 0, dims))
    new_weight, *new_bias = views(weight, bias, leaves)
    return new_weight, new_bias[0] if new_bias else None


def _place_for_bias(site: Site, own: Mapping[str, Tensor], name: str) -> str:
    beside = bias_name(own, name)
    if beside is None:
        raise TypeError(
            f"{site.path}: {site.variant.name} gives it a bias, for which its module has no place"
        )
    return beside
