"""The leaves of each site during a call, and what is prepared from them before the model runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.adapter import SHARED, parse
from lora_func.modules import original_parameters
from lora_func.numerics import DROPOUT
from lora_func.runtime._layout import ModelLayout
from lora_func.runtime._losses import Rows
from lora_func.runtime._site import Site, runs_apply, runs_by_products
from lora_func.variant import prepare_sites
from lora_func.weights import affine, is_quantised, matrix


@dataclass(frozen=True, eq=False, slots=True)
class SiteLeaves:
    """The leaves of a site during a call.

    Attributes:
        raw: The leaves, with the constants detached, and with dropout only if the module trains.
        ready: The same and what was prepared from them.
        dtype: The dtype of the activations for which it did; None if nothing was prepared.
        training: The mode of the module when they were prepared, if it decides on dropout.
    """

    raw: Mapping[str, Tensor]
    ready: Mapping[str, Tensor]
    dtype: torch.dtype | None
    training: bool | None = None

    def suited(self, x: Any) -> Mapping[str, Tensor]:
        """Return what ``apply`` takes with these activations."""
        return self.ready if x.dtype == self.dtype else self.raw

    def unstacked(self) -> list["SiteLeaves"]:
        """Return the leaves of each adapter of a stack, none of them prepared."""
        each = zip(*(tensor.unbind() for tensor in self.raw.values()), strict=True)
        adapters = [dict(zip(self.raw, own, strict=True)) for own in each]
        return [SiteLeaves(own, own, None) for own in adapters]


@dataclass(frozen=True, eq=False, slots=True)
class AdapterLeaves:
    """The leaves of an adapter during a call.

    Attributes:
        params: The adapter, or a stack.
        prepared: The place of a site -> its leaves, if they are prepared.
    """

    params: Mapping[str, Tensor]
    prepared: Mapping[tuple[str, str], SiteLeaves]

    def at(self, sites: Iterable[Site]) -> list[SiteLeaves]:
        """Return the leaves of sites."""
        return [self._of(site) for site in sites]

    def _of(self, site: Site) -> SiteLeaves:
        found = self.prepared.get(site.place)
        if found is not None and found.training in (None, site.module.training):
            return found
        raw = leaves_of(site, self.params)
        return SiteLeaves(raw, raw, None)


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


def leaves_for_call(
    model: nn.Module,
    layouts: Iterable[ModelLayout],
    adapters: Iterable[Mapping[str, Tensor]],
    prepares: bool,
    rows: Rows | None,
) -> tuple[AdapterLeaves, ...]:
    """Prepare the leaves of all sites, once for all sites of one kind.

    Args:
        model: The model.
        layouts: The layout of each adapter.
        adapters: One adapter; with ``rows`` stacks of adapters.
        prepares: Whether to prepare their leaves.
        rows: Which rows belong to which adapter; None for one adapter.

    Returns:
        The leaves of each adapter.
    """
    return tuple(
        AdapterLeaves(params, _prepared(model, layout, params, rows) if prepares else {})
        for layout, params in zip(layouts, adapters, strict=True)
    )


def _prepared(
    model: nn.Module, layout: ModelLayout, params: Mapping[str, Tensor], rows: Rows | None
) -> dict[tuple[str, str], SiteLeaves]:
    kinds: dict[Any, list[tuple[Site, dict[str, Tensor]]]] = {}
    for sites in layout.groups:
        for site in sites:
            layer = _layer(model, site, sites, rows is not None)
            if layer is not None:
                raw = leaves_of(site, params)
                tensors = ((leaf, t.shape, t.dtype, t.device) for leaf, t in raw.items())
                kinds.setdefault((site.variant.name, *layer, *tensors), []).append((site, raw))
    found = {}
    for (_, shape, dtype, *_), alike in kinds.items():
        leaves = [raw for _, raw in alike]
        every = _prepare(alike[0][0], leaves, shape, dtype)
        for (site, raw), ready in zip(alike, every, strict=True):
            training = site.module.training if DROPOUT in site.keys else None
            found[site.place] = SiteLeaves(raw, ready, dtype, training)
    return found


def _layer(
    model: nn.Module, site: Site, sites: Sequence[Site], stacked: bool
) -> tuple[tuple[int, int], torch.dtype] | None:
    """The shape of a site's weight and the dtype of its activations, if its ``apply`` runs."""
    module, own = site.module, original_parameters(site.module)
    weight, alone = own.get(site.parameter or "weight"), len(sites) == 1
    prepares = site.variant.prepare is not None or site.variant.casts
    if not prepares or weight is None:
        return None
    if stacked and not (site.variant.stacks and alone and runs_apply(sites, module)):
        return None  # adapter by adapter
    if runs_apply(sites, module):
        W = affine(module, site.path)
    elif alone and runs_by_products(site, module):
        W = matrix(module, own)
    else:
        return None
    if len(W.weight.shape) != 2:  # a part of a weight that is spread over devices
        return None
    return W.shape, _activations(model) if is_quantised(module) else W.dtype


def _activations(model: nn.Module) -> torch.dtype:
    """The dtype in which a model with quantised layers most likely computes."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _prepare(
    site: Site,
    leaves: Sequence[dict[str, Tensor]],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> list[dict[str, Tensor]]:
    """Prepare the leaves of the sites that are like one."""
    variant = site.variant
    shared = {leaf for leaf, key in site.keys.items() if parse(key).site == SHARED}
    try:
        return prepare_sites(variant, leaves, shared, shape, dtype)
    except Exception as error:
        error.add_note(f"in prepare of {variant.name}, for {len(leaves)} sites like {site.path!r}")
        raise
