"""What the keys of an adapter mean in a model: parsed once, then looked up."""

from collections.abc import Callable, Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from lora_func._keys import RANK, group
from lora_func._modules import Structure, structure
from lora_func._transforms import has_fast_path
from lora_func._types import Variant
from lora_func._weight import is_linear
from lora_func.variants import by_name


class Site(NamedTuple):
    """An adapted module, as the keys of an adapter name it.

    Attributes:
        path: The module's path.
        module: The module, weakly, so that a cached plan keeps no model alive.
        variant: The variant at work there.
        keys: Leaf -> key in the adapter.
    """

    path: str
    module: Callable[[], nn.Module | None]
    variant: Variant
    keys: dict[str, str]


class Plan(NamedTuple):
    """The layout of an adapter in a model: what its keys say, read once.

    Attributes:
        structure: The modules of the model when the plan was made.
        sites: The adapted modules.
        checkpointing: The modules that can recompute their part of the model in the backward pass,
            weakly.
        fast_path: Whether the model has layers with a fused inference kernel.
    """

    structure: Structure
    sites: tuple[Site, ...]
    checkpointing: tuple[Callable[[], nn.Module | None], ...]
    fast_path: bool


_plans: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], Plan]] = WeakKeyDictionary()


def plan_of(model: nn.Module, params: Mapping[str, Tensor]) -> Plan:
    """Return the layout of an adapter in a model.

    Args:
        model: The model.
        params: The adapter; only its keys are read.

    Returns:
        The plan, made anew if a module of the model was replaced since.

    Raises:
        KeyError: If a key names no module of the model or no variant.
        TypeError: If a variant cannot adapt the module that a key names.
        ValueError: If two variants name one module.
    """
    if torch.compiler.is_compiling():
        return _make_plan(model, params)
    plans = _plans.setdefault(model, {})
    keys = tuple(params)
    plan = plans.get(keys)
    if (
        plan is None
        or plan.structure != structure(model)
        or any(s.module() is None for s in plan.sites)
    ):
        plan = plans[keys] = _make_plan(model, params)
    return plan


def _make_plan(model: nn.Module, params: Mapping[str, Tensor]) -> Plan:
    sites: dict[int, Site] = {}
    for (path, variant_name), keys in group(params).items():
        keys.pop(RANK, None)
        site = _site(model, path, by_name(variant_name), keys)
        module = site.module()
        if id(module) in sites:
            other = sites[id(module)]
            raise ValueError(
                f"{path}: adapted twice, by {other.variant.name} at {other.path!r} and by "
                f"{variant_name}; a module takes one variant"
            )
        sites[id(module)] = site
    checkpointing = tuple(ref(m) for m in model.modules() if hasattr(m, "gradient_checkpointing"))
    return Plan(structure(model), tuple(sites.values()), checkpointing, has_fast_path(model))


def _site(model: nn.Module, path: str, variant: Variant, keys: dict[str, str]) -> Site:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise KeyError(f"{next(iter(keys.values()))!r}: the model has no module {path!r}") from None
    if variant.parameters is None and not is_linear(module):
        raise TypeError(
            f"{path}: {variant.name} adapts torch.nn.Linear and transformers' Conv1D, found "
            f"{type(module).__name__}"
        )
    if variant.parameters is not None:
        for leaf in keys:
            if module._parameters.get(leaf) is None:
                raise KeyError(
                    f"{keys[leaf]!r}: {type(module).__name__} {path!r} has no parameter {leaf!r}"
                )
    return Site(path, ref(module), variant, keys)
