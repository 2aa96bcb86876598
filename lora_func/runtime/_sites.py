"""How an adapted site computes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_func.runtime._frozen import Forward, OtherForward, Watched, frozen_parameters
from lora_func.runtime._layout import Plan, Site
from lora_func.runtime._operands import AdaptedWeight, multiplies
from lora_func.runtime._patches import Put
from lora_func.runtime._views import new_bias, new_weight
from lora_func.weights._bitsandbytes import is_quantised
from lora_func.weights._layers import (
    affine,
    bias_name,
    dense,
    is_stack,
    matrix,
    refuse_computed,
    stored,
)


def refuse_other_axes(plan: Plan, params: Mapping[str, Tensor]) -> None:
    """Refuse a stack of adapters where one is wanted; its axis might pass for that of a batch.

    Raises:
        ValueError: If a leaf has other axes than its variant says.
    """
    for key, axes in plan.axes.items():
        if params[key].ndim != len(axes):
            raise ValueError(
                f"{key}: got shape {tuple(params[key].shape)}, expected ({', '.join(axes)}); a "
                "stack goes through torch.vmap or vcall"
            )


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
    replaced: dict[str, Any] = {}
    for site, of_it in zip(sites, leaves, strict=True):
        new = _standing_in if multiplies(site, module) else effective
        replaced |= new(site, module, own, of_it)
    with Put((own, name, tensor) for name, tensor in replaced.items()):
        return frozen(*args, **kwargs)


def _standing_in(
    site: Site, module: nn.Module, own: Mapping[str, Any], leaves: Mapping[str, Tensor]
) -> dict[str, AdaptedWeight]:
    base = {**own}

    def whole() -> Tensor:
        return effective(site, module, base, leaves)["weight"]

    return {"weight": AdaptedWeight(site, own["weight"], leaves, whole)}


@dataclass(slots=True, eq=False, repr=False)
class Solo(OtherForward):
    """Runs a module with one adapter; an object, since the compiler writes into no loose set.

    Attributes:
        module: The module.
        sites: Its sites.
        params: The adapter.
        unused: Its keys, of which those are struck off that are read.
    """

    module: nn.Module
    sites: Sequence[Site]
    params: Mapping[str, Tensor]
    unused: set[str] | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            leaves = [leaves_of(site, self.params, self.unused) for site in self.sites]
            return run_sites(self.sites, self.module, leaves, self.base, *args, **kwargs)
        except Exception as error:
            error.add_note(f"in the {named(self.sites)}")
            raise


def named(sites: Iterable[Site]) -> str:
    """Name the adapters of a module, for messages."""
    variants = {site.variant.name: None for site in sites}
    paths = {site.path: None for site in sites}
    return f"{', '.join(variants)} adapter of {', '.join(paths)!r}"


def runs_apply(sites: Sequence[Site], module: nn.Module) -> bool:
    """Tell whether a variant's ``apply`` does what the adapted module does."""
    (site, *more) = sites
    plain = type(module) is nn.Linear or is_quantised(module)
    own = site.variant.parameters is None or plain
    return site.parameter is None and own and not more


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
