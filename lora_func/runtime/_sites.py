"""How an adapted module computes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.compat import PARAMETERS
from lora_func.modules import inner_parameters, is_spread
from lora_func.runtime._leaves import AdapterLeaves, SiteLeaves
from lora_func.runtime._operands import lookup, run_by_products
from lora_func.runtime._overrides import CallState, Forward, ForwardOverride, adapted_tensor
from lora_func.runtime._parallel import lifted
from lora_func.runtime._patches import patched
from lora_func.runtime._site import Site, runs_apply, runs_by_products
from lora_func.runtime._views import check_no_dropout, dense_parameters, effective_parameters
from lora_func.weights import affine, is_quantised


def run_sites(
    sites: Sequence[Site],
    module: nn.Module,
    leaves: Sequence[SiteLeaves],
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
        (x,) = (*args, *kwargs.values())
        return run_apply(sites, module, leaves, x)
    own = inner_parameters(module)
    if len(sites) == 1 and runs_by_products(sites[0], module):
        (x,) = (*args, *kwargs.values())
        return run_by_products(sites[0], module, own, leaves[0], x)
    replaced: dict[str, Tensor] = {}
    for site, of_it in zip(sites, leaves, strict=True):
        check_no_dropout(site, of_it.raw)
        replaced |= _table(site, own, of_it) or effective_parameters(site, own, of_it.raw)
    return run_base(module, base, *args, replaced=replaced, **kwargs)


def run_apply(
    sites: Sequence[Site], module: nn.Module, leaves: Sequence[SiteLeaves], x: Tensor
) -> Tensor:
    """Run the ``apply`` of a module's variant.

    Args:
        sites: The module's sites: one, or a second one that trains the bias.
        module: A module that ``runs_apply`` accepts.
        leaves: The leaves of each site.
        x: Activations, shape (..., d_in).

    Returns:
        Shape (..., d_out).
    """
    W, first = affine(module, sites[0].path), 0
    if len(sites) > 1:
        first = 0 if sites[0].variant.parameters is None else 1
        W = W._replace(bias=leaves[1 - first].raw["bias"].to(W.dtype))
    site, own = sites[first], leaves[first]
    suited = lifted(site, own, W, x) if is_spread(W.weight) else own.suited(x)
    return site.variant.apply(W, suited, x)


def _table(site: Site, own: Mapping[str, Any], leaves: SiteLeaves) -> dict[str, Tensor] | None:
    """The table of a subclass of ``nn.Embedding``, which its forward may only look up rows of."""
    is_table = isinstance(site.module, nn.Embedding) and site.parameter == "weight"
    if not is_table or not site.variant.products_only or torch.compiler.is_compiling():
        return None

    def compute() -> Tensor:
        return effective_parameters(site, own, leaves.raw)["weight"]

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
        leaves: The leaves of the adapter.
        call: The call.
    """

    sites: Sequence[Site]
    leaves: AdapterLeaves
    call: CallState

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.call.live:
            return self.original(*args, **kwargs)
        try:
            unused = self.call.unused
            if unused:
                for site in self.sites:
                    unused.difference_update(site.known)
            leaves = self.leaves.at(self.sites)
            return run_sites(self.sites, self.module, leaves, self.base, *args, **kwargs)
        except Exception as error:
            error.add_note(f"in the {adapter_names(self.sites)}")
            raise

    def adapt(self, name: str, stored: Any) -> Any:
        """Give code outside the module the adapted parameter in place of a stored one."""
        if is_spread(stored) and id(self.module) in self.call.sharding.gathered:
            return stored  # FSDP2 reads its own shard
        changes = self.call.live and any(name in site.changed_names for site in self.sites)
        return adapted_tensor(stored, partial(self._adapted, name)) if changes else stored

    def _adapted(self, name: str) -> Tensor:
        own, new = inner_parameters(self.module), dict[str, Tensor]()
        for site, leaves in zip(self.sites, self.leaves.at(self.sites), strict=True):
            base = dense_parameters(site) if is_quantised(self.module) else own
            new |= effective_parameters(site, base, leaves.raw)
        found: Tensor = new.get(name, own[name])
        return found


def adapter_names(sites: Iterable[Site]) -> str:
    """Name the adapters of a module, for messages."""
    variants = {site.variant.name: None for site in sites}
    paths = {site.path: None for site in sites}
    return f"{', '.join(variants)} adapter of {', '.join(paths)!r}"
