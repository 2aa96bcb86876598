"""What the keys of an adapter mean in a model: parsed once, then looked up."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from lora_func.adapter._keys import RANK, SHARED, group, parse
from lora_func.modules import Structure, identities, place_of, structure
from lora_func.runtime._transforms import has_fast_path, transformed
from lora_func.variant import Variant
from lora_func.variants import by_name
from lora_func.weights._bitsandbytes import is_opaque, is_quantised
from lora_func.weights._layers import (
    bias_name,
    has_matrix,
    is_linear,
    is_stack,
    matrix,
    refuse_computed,
)


class Site(NamedTuple):
    """An adapted module or parameter, as the keys of an adapter name it.

    Attributes:
        path: Its path.
        module: The module, or the one that holds the parameter; weakly, so that a cached plan keeps
            no model alive.
        parameter: The parameter that gets an effective weight; None where the variant's ``apply``
            runs in the module's place, or its ``parameters`` say which.
        everywhere: Whether parameters are replaced for the whole call, wherever they are read, and
            not while their module runs alone.
        claims: The parameters that nobody else may adapt; None for all of the module's.
        variant: The variant at work there.
        keys: Leaf -> key in the adapter.
        reads: Leaf -> the keys that reading it uses: its own.
    """

    path: str
    module: Callable[[], nn.Module | None]
    parameter: str | None
    everywhere: bool
    claims: set[str] | None
    variant: Variant
    keys: dict[str, str]
    reads: Mapping[str, tuple[str, ...]]


class Plan(NamedTuple):
    """The layout of an adapter in a model: what its keys say, read once.

    Attributes:
        structure: The modules of the model when the plan was made.
        sites: The adapted modules and parameters.
        groups: The same, module by module.
        keys: Their keys.
        axes: Key -> the names of the axes that its leaf has in one adapter, where they are known.
        changed: The ids of the modules that run another forward or have other parameters.
        checkpoints: The modules that can recompute their part of the model in the backward pass,
            weakly.
        norms: The modules that can take statistics over the batch, weakly.
        quantised: Path and module, weakly, of each layer that bitsandbytes has quantised.
        opaque: The same of each layer that derives from those and has a forward of its own.
        fast_path: Whether the model has layers with a fused inference kernel.
        folds: What the first fold of this layout with others showed: why they cannot share a call,
            or None.
    """

    structure: Structure
    sites: tuple[Site, ...]
    groups: tuple[tuple[Site, ...], ...]
    keys: frozenset[str]
    axes: Mapping[str, tuple[str, ...]]
    changed: frozenset[int]
    checkpoints: tuple[Callable[[], nn.Module | None], ...]
    norms: tuple[Callable[[], nn.Module | None], ...]
    quantised: tuple[tuple[str, Callable[[], nn.Module | None]], ...]
    opaque: tuple[tuple[str, Callable[[], nn.Module | None]], ...]
    fast_path: bool
    folds: dict[Any, str | None]

    def inside(self, module: nn.Module) -> "Plan":
        """Return the part that goes into one module of the model."""
        within = identities(module)
        return self._replace(
            sites=tuple(site for site in self.sites if id(site.module()) in within),
            groups=tuple(group for group in self.groups if id(group[0].module()) in within),
            changed=self.changed & within,
            quantised=tuple(q for q in self.quantised if id(q[1]()) in within),
        )


_plans: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], Plan]] = WeakKeyDictionary()


def plan_of(model: nn.Module, params: Mapping[str, Tensor]) -> Plan:
    """Return the layout of an adapter in a model.

    Args:
        model: The model.
        params: The adapter; only its keys are read.

    Returns:
        The plan, made anew if a module of the model was replaced since.

    Raises:
        KeyError: If a key names no module or parameter of the model, or no variant.
        TypeError: If a variant cannot adapt what a key names.
        ValueError: If two variants name one module.
    """
    if torch.compiler.is_compiling():
        return _make_plan(model, params, {})
    plans = _plans.setdefault(model, {})
    keys = tuple(params)
    plan = plans.get(keys)
    if plan is None or not plan.structure.holds():
        plan = plans[keys] = _make_plan(model, params, plans)
    return plan


def refuse_untransformable(plan: Plan) -> None:
    """Refuse a model that cannot run under the transforms that are active.

    Raises:
        RuntimeError: If a BatchNorm is in training mode, a quantised layer has a forward of its
            own, or activations are checkpointed while compiling.
    """
    if not transformed():
        return
    if plan.opaque:
        raise RuntimeError(
            f"{plan.opaque[0][0]}: derives from a quantised layer of bitsandbytes and has a "
            "forward of its own, which loses derivatives under transforms; use autograd"
        )
    for norm in filter(None, (reference() for reference in plan.norms)):
        if norm.training and norm.track_running_stats:
            raise RuntimeError(
                f"{type(norm).__name__}: in training mode it writes its running statistics, which "
                "no transform of torch.func can; call eval() on it, as befits a frozen base"
            )
    if not torch.compiler.is_compiling():
        return
    for module in filter(None, (reference() for reference in plan.checkpoints)):
        if module.gradient_checkpointing and module.training:
            raise RuntimeError(
                f"{type(module).__name__}: activation checkpointing under a compiled transform of "
                "torch.func is beyond torch; compile without it, or differentiate by autograd"
            )


def _make_plan(
    model: nn.Module, params: Mapping[str, Tensor], plans: dict[tuple[str, ...], Plan]
) -> Plan:
    groups: dict[int, list[Site]] = {}
    for (path, variant_name), keys in group(params).items():
        keys.pop(RANK, None)
        site = _site(model, path, by_name(variant_name), keys)
        others = groups.setdefault(id(site.module()), [])
        _refuse_sharing(site, others)
        others.append(site)
    named = [(path, ref(m), m) for path, m in model.named_modules()]
    modules = [module for _, _, module in named]
    sites = tuple(site for group in groups.values() for site in group)
    return Plan(
        structure(model, lambda _: plans.clear()),
        sites,
        tuple(map(tuple, groups.values())),
        frozenset(key for site in sites for key in site.keys.values()),
        {key: axes for site in sites for key, axes in _axes(site).items()},
        frozenset(groups) | {id(module) for module in modules if is_quantised(module)},
        tuple(ref(m) for m in modules if hasattr(m, "gradient_checkpointing")),
        tuple(ref(m) for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)),
        tuple((path, reference) for path, reference, m in named if is_quantised(m)),
        tuple((path, reference) for path, reference, m in named if is_opaque(m)),
        has_fast_path(model),
        {},
    )


def _site(model: nn.Module, path: str, variant: Variant, keys: dict[str, str]) -> Site:
    try:
        module, parameter = place_of(model, path)
    except KeyError as error:
        raise KeyError(f"{next(iter(keys.values()))!r}: {error.args[0]}") from None
    reads = {leaf: (key,) for leaf, key in keys.items()}
    if variant.parameters is not None:
        for leaf in keys:
            if module._parameters.get(leaf) is None:
                raise KeyError(
                    f"{keys[leaf]!r}: {type(module).__name__} {path!r} has no parameter {leaf!r}"
                )
        return Site(path, ref(module), None, True, {*keys}, variant, keys, reads)
    never_called = _is_never_called(model, path)
    if parameter is None and is_linear(module) and not never_called:
        return Site(path, ref(module), None, False, None, variant, keys, reads)
    name = parameter or "weight"
    _refuse_without_matrix(path, module, name, variant, parameter is None)
    claims = None
    if parameter is not None or never_called:
        beside = bias_name(module._parameters, name) if variant.bias is not None else None
        claims = {name} if beside is None else {name, beside}
    return Site(path, ref(module), name, claims is not None, claims, variant, keys, reads)


def _axes(site: Site) -> dict[str, tuple[str, ...]]:
    """Key -> the names of its leaf's axes; leaves of a stack of weights have one in front."""
    module, axes = site.module(), site.variant.axes
    assert module is not None
    weight = None if site.parameter is None else matrix(module, module._parameters, site.parameter)
    front = ("n",) if is_stack(weight) else ()
    return {
        key: axes[leaf] if parse(key).site == SHARED else (*front, *axes[leaf])
        for leaf, key in site.keys.items()
        if leaf in axes
    }


def _refuse_without_matrix(
    path: str, module: nn.Module, name: str, variant: Variant, as_module: bool
) -> None:
    if as_module and not has_matrix(module):
        raise TypeError(
            f"{path}: {variant.name} adapts torch.nn.Linear, transformers' Conv1D, bitsandbytes' "
            "quantised linear layers, convolutions, embeddings, and parameters by their own name; "
            f"found {type(module).__name__}"
        )
    if variant.weight is None:
        raise TypeError(
            f"{path}: {variant.name} is not linear in x and has no weight to put there; it adapts "
            "linear layers alone"
        )
    refuse_computed(path, module._parameters, name)
    if getattr(module, "sparse", False):
        raise TypeError(f"{path}: {variant.name} has no sparse gradients; set sparse=False")


def _is_never_called(model: nn.Module, path: str) -> bool:
    """Whether torch reads the module's weight past it."""
    parent, _, name = path.rpartition(".")
    around, _ = place_of(model, parent)
    return name == "out_proj" and isinstance(around, nn.MultiheadAttention)


def _refuse_sharing(site: Site, others: Iterable[Site]) -> None:
    for other in others:
        mine, theirs = site.claims, other.claims
        if mine is None or theirs is None or mine & theirs:
            raise ValueError(
                f"{site.path}: adapted twice, by {other.variant.name} at {other.path!r} and by "
                f"{site.variant.name}; a module takes one variant"
            )
