"""The layout of an adapter in a model: what its keys name, parsed once and cached."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from lora_func.adapter import RANK, SHARED, Key, check_adapter, check_required, group, parse
from lora_func.compat import buffers_of, mixes_rows_in_training
from lora_func.modules import Structure, attached_path, identities, inner_model, structure
from lora_func.runtime._settings import has_fast_path
from lora_func.runtime._site import Reference, Site, check_claims, make_site, ndims_of
from lora_func.variant import Variant
from lora_func.variants import by_name
from lora_func.weights import device_of_module, is_quantised, is_unknown_quantised

CACHED_LAYOUTS = 64
"""How many layouts and verdicts are kept for each model; the oldest is forgotten first."""


class ModelLayout(NamedTuple):
    """The layout of an adapter in a model.

    Attributes:
        structure: The modules of the model when the layout was made.
        sites: The adapted modules and parameters.
        groups: The same, module by module.
        acting: Of each module the sites that act while it runs; others replace parameters for the
            whole call.
        variants: The variants at work.
        keys: Their keys.
        ndims: Key -> the numbers of axes that its leaf may have in one adapter, if known.
        usual_ndims: The first of these numbers for each key.
        changed: The ids of the modules that run another forward or have other parameters.
        checkpoints: The modules that can recompute their part of the model, weakly.
        norms: The modules that keep running statistics, or use those of the batch, weakly.
        recurrent: The modules that remember the weights of their last call, weakly.
        quantised: Path and module, weakly, of each layer that bitsandbytes has quantised.
        unknown_quantised: The same of each subclass of those with a forward of its own.
        fast_path: True if the model has layers with a fused inference kernel.
        attached: The path of a module that has an adapter attached; None if there is none.
        verdicts: Kind of sweep -> True, if its first fold was equal to solo runs.
    """

    structure: Structure
    sites: tuple[Site, ...]
    groups: tuple[tuple[Site, ...], ...]
    acting: tuple[tuple[Site, ...], ...]
    variants: tuple[Variant, ...]
    keys: frozenset[str]
    ndims: Mapping[str, tuple[int, ...]]
    usual_ndims: list[int]
    changed: frozenset[int]
    checkpoints: tuple[Reference, ...]
    norms: tuple[Reference, ...]
    recurrent: tuple[Reference, ...]
    quantised: tuple[tuple[str, Reference], ...]
    unknown_quantised: tuple[tuple[str, Reference], ...]
    fast_path: bool
    attached: str | None
    verdicts: "OrderedDict[Any, bool]"

    def is_current(self) -> bool:
        """True if no variant was registered again since the layout was made."""
        return all(by_name(variant.name) is variant for variant in self.variants)

    def inside(self, module: nn.Module) -> "ModelLayout":
        """Return the part that goes into one module of the model."""
        within = identities(module)
        return self._replace(
            sites=tuple(site for site in self.sites if id(site.module) in within),
            groups=tuple(sites for sites in self.groups if id(sites[0].module) in within),
            acting=tuple(sites for sites in self.acting if id(sites[0].module) in within),
            changed=self.changed & within,
            quantised=tuple(q for q in self.quantised if id(q[1]()) in within),
        )


_layouts: WeakKeyDictionary[nn.Module, "OrderedDict[frozenset[str], ModelLayout]"]
_layouts = WeakKeyDictionary()


def layout_of(model: nn.Module, params: Mapping[str, Tensor]) -> ModelLayout:
    """Return the layout of an adapter in a model.

    Args:
        model: The model.
        params: The adapter; only its keys are read.

    Returns:
        The layout; a new one if a module of the model was replaced since the last call.

    Raises:
        KeyError: If a key names no module or parameter of the model, or no variant.
        TypeError: If params is no mapping, or a variant cannot adapt what a key names.
        ValueError: If two variants name one module, or a leaf is missing.
    """
    check_adapter(params)
    if torch.compiler.is_compiling():
        return _make_layout(model, params, lambda _: None)
    kept = _layouts.get(model)
    if kept is None:
        kept = _layouts[model] = OrderedDict()
    keys = frozenset(params)
    layout = kept.get(keys)
    if layout is None or not layout.structure.holds() or not layout.is_current():
        layout = _make_layout(model, params, lambda _: kept.clear())
        remember(kept, keys, layout)
    return layout


def remember(kept: "OrderedDict[Any, Any]", key: Any, value: Any) -> None:
    """Keep a value, and forget the oldest of more than ``CACHED_LAYOUTS``."""
    kept[key] = value
    while len(kept) > CACHED_LAYOUTS:
        kept.popitem(last=False)


def present(references: Iterable[Reference]) -> list[nn.Module]:
    """Return the modules that are still alive."""
    modules = [reference() for reference in references]
    return [module for module in modules if module is not None]


def devices_of(params: Mapping[str, Tensor], model: nn.Module | None) -> dict[str, torch.device]:
    """Return the device of each leaf: that of its site, or the CPU without a model or data."""
    cpu = torch.device("cpu")
    found: dict[tuple[str, str], torch.device] = {}
    for site in () if model is None else layout_of(inner_model(model), params).sites:
        name = next(iter(site.keys)) if site.variant.parameters else site.parameter or "weight"
        device = device_of_module(site.module, name)
        device = cpu if device.type == "meta" else device
        found[site.path, site.variant.name] = device
        found.setdefault((SHARED, site.variant.name), device)
    return {key: found.get((parse(key).site, parse(key).variant), cpu) for key in params}


def _make_layout(
    model: nn.Module, params: Mapping[str, Tensor], forget: Callable[[object], None]
) -> ModelLayout:
    groups: dict[int, list[Site]] = {}
    for (path, variant_name), keys in group(params).items():
        keys.pop(RANK, None)
        site = make_site(model, path, by_name(variant_name), keys)
        others = groups.setdefault(id(site.module), [])
        check_claims(site, others)
        check_required(str(Key(path, variant_name, "")), site.variant, keys)
        others.append(site)
    named = [(path, ref(m), m) for path, m in model.named_modules()]
    sites = tuple(site for sites in groups.values() for site in sites)
    ndims = {key: of_leaf for site in sites for key, of_leaf in ndims_of(site).items()}
    return ModelLayout(
        structure(model, forget),
        sites,
        tuple(map(tuple, groups.values())),
        tuple(filter(None, map(_acting, groups.values()))),
        tuple({site.variant.name: site.variant for site in sites}.values()),
        frozenset(key for site in sites for key in site.keys.values()),
        ndims,
        [first for first, *_ in ndims.values()],
        frozenset(groups) | {id(module) for _, _, module in named if is_quantised(module)},
        tuple(reference for _, reference, m in named if hasattr(m, "gradient_checkpointing")),
        tuple(reference for _, reference, m in named if _uses_statistics(m)),
        tuple(reference for _, reference, m in named if isinstance(m, nn.RNNBase)),
        tuple((path, reference) for path, reference, m in named if is_quantised(m)),
        tuple((path, reference) for path, reference, m in named if is_unknown_quantised(m)),
        has_fast_path(model),
        attached_path(model),
        OrderedDict(),
    )


def _acting(sites: Iterable[Site]) -> tuple[Site, ...]:
    return tuple(site for site in sites if not site.everywhere)


def _uses_statistics(module: nn.Module) -> bool:
    return mixes_rows_in_training(module) or buffers_of(module).get("running_mean") is not None
