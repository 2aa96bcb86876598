"""How an adapted module computes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.compat import PARAMETERS
from lora_func.modules import inner_parameters
from lora_func.numerics import DROPOUT
from lora_func.runtime._operands import lookup, run_by_products, runs_by_products
from lora_func.runtime._overrides import CallState, Forward, ForwardOverride, adapted_tensor
from lora_func.runtime._patches import patched
from lora_func.runtime._site import Site
from lora_func.runtime._views import check_no_dropout, dense_parameters, effective_parameters
from lora_func.weights import (
    affine,
    is_linear,
    is_quantised,
)


def leaves_of(site: Site, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the leaves of a site, with its constants detached.

    Args:
        site: The site.
        params: The adapter.

    Returns:
        The leaves by name, with dropout only if the module is in training mode.
    """
    leaves = {leaf: params[key] for leaf, key in site.keys.items()}
    for leaf in leaves:
        if leaf[0] == "_":
            leaves[leaf] = leaves[leaf].detach()
    if DROPOUT in leaves and not site.module.training:
        del leaves[DROPOUT]
    return leaves


def run_sites(
    sites: Sequence[Site],
    module: nn.Module,
    leaves: Sequence[Mapping[str, Tensor]],
    base: Forward,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a module with one adapter.

    Args:
        sites: The module's sites: one, or several with different parameters.
        module: The module.
        leaves: The leaves of each site.
        base: What the module runs without an adapter.
        *args: The arguments of the module.
        **kwargs: The keyword arguments of the module.

    Returns:
        What the adapted module returns.
    """
    if runs_apply(sites, module):
        (x,), W = (*args, *kwargs.values()), affine(module, sites[0].path)
        if len(sites) == 1:
            return sites[0].variant.apply(W, leaves[0], x)
        first = 0 if sites[0].variant.parameters is None else 1
        bias = leaves[1 - first]["bias"].to(W.dtype)
        return sites[first].variant.apply(W._replace(bias=bias), leaves[first], x)
    own = inner_parameters(module)
    if len(sites) == 1 and runs_by_products(sites[0], module):
        (x,) = (*args, *kwargs.values())
        return run_by_products(sites[0], module, own, leaves[0], x)
    replaced: dict[str, Tensor] = {}
    for site, of_it in zip(sites, leaves, strict=True):
        check_no_dropout(site, of_it)
        replaced |= _table(site, own, of_it) or effective_parameters(site, own, of_it)
    return run_base(module, base, *args, replaced=replaced, **kwargs)


def _table(
    site: Site, own: Mapping[str, Any], leaves: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """The table of a subclass of ``nn.Embedding``, which its forward may only look up rows of."""
    is_table = isinstance(site.module, nn.Embedding) and site.parameter == "weight"
    if not is_table or not site.variant.products_only or torch.compiler.is_compiling():
        return None

    def compute() -> Tensor:
        return effective_parameters(site, own, leaves)["weight"]

    rows = partial(lookup, site, own, leaves)
    return {"weight": adapted_tensor(own["weight"], compute, rows)}


def run_base(
    module: nn.Module,
    base: Forward,
    *args: Any,
    replaced: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """Run a module's own forward, which reads its parameters by name.

    Args:
        module: The module.
        base: Its forward.
        *args: The arguments of the module.
        replaced: Parameters to replace while it runs, by name.
        **kwargs: The keyword arguments of the module.

    Returns:
        What the forward returns.
    """
    own = {**inner_parameters(module), **(replaced or {})}
    with patched([(vars(module), PARAMETERS, own)]):
        return base(*args, **kwargs)


@dataclass(slots=True, eq=False, repr=False)
class SingleForward(ForwardOverride):
    """Runs a module with one adapter.

    Attributes:
        sites: The module's sites.
        call: The call.
    """

    sites: Sequence[Site]
    call: CallState

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.call.live:
            return self.original(*args, **kwargs)
        try:
            unused = self.call.unused
            if unused:
                for site in self.sites:
                    unused.difference_update(site.known)
            leaves = self._leaves()
            return run_sites(self.sites, self.module, leaves, self.base, *args, **kwargs)
        except Exception as error:
            error.add_note(f"in the {adapter_names(self.sites)}")
            raise

    def _leaves(self) -> list[dict[str, Tensor]]:
        (params,) = self.call.adapters
        return [leaves_of(site, params) for site in self.sites]

    def adapt(self, name: str, stored: Any) -> Any:
        """Give code outside the module the adapted parameter in place of a stored one."""
        changes = self.call.live and any(name in site.changed_names for site in self.sites)
        return adapted_tensor(stored, partial(self._adapted, name)) if changes else stored

    def _adapted(self, name: str) -> Tensor:
        own, new = inner_parameters(self.module), dict[str, Tensor]()
        for site, leaves in zip(self.sites, self._leaves(), strict=True):
            base = dense_parameters(site) if is_quantised(self.module) else own
            new |= effective_parameters(site, base, leaves)
        found: Tensor = new.get(name, own[name])
        return found


def adapter_names(sites: Iterable[Site]) -> str:
    """Name the adapters of a module, for messages."""
    variants = {site.variant.name: None for site in sites}
    paths = {site.path: None for site in sites}
    return f"{', '.join(variants)} adapter of {', '.join(paths)!r}"


def runs_apply(sites: Sequence[Site], module: nn.Module) -> bool:
    """True if the variant's ``apply`` replaces the module's forward."""
    if len(sites) == 1:
        (site,) = sites
        plain = type(module) is nn.Linear or is_quantised(module)
        return site.parameter is None and (site.variant.parameters is None or plain)
    # beside a variant that leaves the bias as it is, the bias may be trained itself
    kinds = [site.variant.parameters is None for site in sites if site.parameter is None]
    return sorted(kinds) == [False, True] and len(sites) == 2 and is_linear(module)
