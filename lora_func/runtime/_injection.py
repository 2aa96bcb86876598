"""Putting adapters into a live model for the length of a call, and taking them out again."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_func.modules import PartOfCall, named_parameters, uncompiled
from lora_func.runtime._checkpoint import intercepted
from lora_func.runtime._frozen import OtherForward, frozen_parameters, other_forward
from lora_func.runtime._layout import Plan, Site, plan_of, refuse_untransformable
from lora_func.runtime._losses import losses_apart
from lora_func.runtime._patches import Put, Slot
from lora_func.runtime._replacements import Replacement, parameter_slots, replacements
from lora_func.runtime._rows import Part, Rows, Together, Untouched
from lora_func.runtime._running import Run, refuse_others, running
from lora_func.runtime._sites import Solo, refuse_other_axes
from lora_func.runtime._transforms import (
    WhileNeeded,
    compiled_attention,
    held,
    settings_now,
    transformable,
    transformed,
)


@dataclass(frozen=True, eq=False)
class Injection:
    """What is put into a model for a call, and can be put there again to repeat a part of it.

    Attributes:
        model: The model, as the caller gave it.
        plans: The layout of each of the adapters.
        adapters: One adapter for all rows; with ``rows`` stacks of them.
        rows: Whose rows are whose; None for one adapter.
        unused: The keys of each of the adapters that nothing has read yet; None while compiling.
        frozen: The base parameters that would get a gradient, to be detached.
        replaced: The parameters that are others for the whole call; computed once, so that a
            repetition has the same.
        settings: What the transforms around the call need.
        origin: The call.
    """

    model: nn.Module
    plans: tuple[Plan, ...]
    adapters: tuple[Mapping[str, Tensor], ...]
    rows: Rows | None
    unused: tuple[set[str] | None, ...]
    frozen: Mapping[str, Tensor]
    replaced: tuple[Replacement, ...]
    settings: tuple[WhileNeeded, ...]
    origin: object

    @property
    def tensors(self) -> list[Tensor]:
        """The adapters' tensors."""
        return [tensor for adapter in self.adapters for tensor in adapter.values()]

    def below(self, module: nn.Module | None) -> "Injection":
        """Return the part that goes into one module of the model; None is all."""
        if module is None:
            return self
        plans = tuple(plan.inside(module) for plan in self.plans)
        adapters = tuple(
            {key: adapter[key] for site in plan.sites for key in site.keys.values()}
            for plan, adapter in zip(plans, self.adapters, strict=True)
        )
        return replace(self, plans=plans, adapters=adapters)

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the model while this is in it."""
        frozen = {name: parameter.detach() for name, parameter in self.frozen.items()}
        return functional_call(self.model, frozen, tuple(args), {**kwargs}, tie_weights=False)

    def redo(
        self,
        tensors: Sequence[Tensor] | None,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Call a function while this is in the model, with other tensors if there are some."""
        again = self
        if tensors is not None:
            values = iter(tensors)
            adapters = tuple({key: next(values) for key in one} for one in self.adapters)
            replaced = _replaced(self.model, self.plans, adapters, self.rows)
            again = replace(self, adapters=adapters, replaced=replaced)
        frozen = {f"model.{name}": parameter.detach() for name, parameter in self.frozen.items()}
        with again.inside():
            part = PartOfCall(self.model, function)
            return functional_call(part, frozen, tuple(args), {**kwargs}, tie_weights=False)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Put this into the model, which afterwards is what it was, whatever happened."""
        if torch.compiler.is_compiling():
            with compiled_attention(), Put(self._slots()):
                yield
            return
        with held(self.settings), Put(self._exclusive_slots()):
            yield

    def _exclusive_slots(self) -> Iterator[Slot]:
        mine = object()
        changed = frozenset[int]().union(*(plan.changed for plan in self.plans))
        modules = self.plans[0].structure.identities
        run = Run(changed, modules, self.origin, self, threading.get_ident())
        yield running, mine, run
        refuse_others(mine)
        yield from self._slots()
        if transformed():
            yield from transformable(self.model)

    def _slots(self) -> Iterator[Slot]:
        rows = self.rows
        for path, reference in self.plans[0].quantised:
            module = reference()
            if module is not None and rows is None:
                yield other_forward(module, path, OtherForward)
            elif module is not None:
                yield other_forward(module, path, Untouched, path, module, rows)
        yield from self._alone() if rows is None else self._together(rows)
        yield from parameter_slots(self.replaced, self.unused[0])

    def _alone(self) -> Iterator[Slot]:
        (plan,), (params,), (unused,) = self.plans, self.adapters, self.unused
        for sites in plan.groups:
            if not sites[0].everywhere:
                path, module = sites[0].path, sites[0].module()
                assert module is not None
                yield other_forward(module, path, Solo, module, sites, params, unused)

    def _together(self, rows: Rows) -> Iterator[Slot]:
        found: dict[Any, list[Sequence[Site]]] = {}
        for i, plan in enumerate(self.plans):
            for sites in plan.groups:
                nobody: list[Sequence[Site]] = [()] * len(self.plans)
                found.setdefault(sites[0].module(), nobody)[i] = sites
        for module, of_all in found.items():
            path = ", ".join({site.path: None for sites in of_all for site in sites})
            parts = [*map(Part, rows.sizes, of_all, self.adapters, self.unused)]
            yield other_forward(module, path, Together, path, module, rows, parts)


def injection(
    model: nn.Module,
    adapters: Sequence[Mapping[str, Tensor]],
    rows: Rows | None = None,
    *,
    detached: bool = True,
    origin: object = None,
) -> Injection:
    """Prepare what goes into a model.

    Args:
        model: The model.
        adapters: One adapter for all rows; with ``rows`` stacks of them.
        rows: Whose rows are whose.
        detached: Whether base parameters that require grad get none.
        origin: The run that this is a part of, if it is.

    Returns:
        The injection, for the transforms that are active now.

    Raises:
        KeyError: If a key names no module or parameter of the model, or no variant.
        TypeError: If a variant cannot adapt what a key names, or the user's own function stands
            where an adapter must go.
        ValueError: If two variants name one module.
        RuntimeError: If the model cannot run under the transforms that are active.
    """
    plans = tuple(plan_of(uncompiled(model), adapter) for adapter in adapters)
    adapters = tuple({**adapter} for adapter in adapters)
    if rows is None:
        refuse_other_axes(plans[0], adapters[0])
    refuse_untransformable(plans[0])
    replaced = _replaced(model, plans, adapters, rows)
    taken = {id(frozen_parameters(r.module)[name]) for r in replaced for name in r.new}
    compiling = torch.compiler.is_compiling()
    frozen = {}
    if detached and (compiling or plans[0].structure.requires_grad()):
        frozen = {
            name: parameter
            for name, parameter in named_parameters(model)
            if parameter.requires_grad and id(parameter) not in taken
        }
    unused: tuple[set[str] | None, ...] = (None,) * len(plans)
    settings: tuple[WhileNeeded, ...] = ()
    if not compiling:
        unused = tuple(set(plan.keys) for plan in plans)
        settings = (intercepted, *settings_now(plans[0].fast_path))
        settings += () if rows is None else (losses_apart,)
        origin = origin or object()
    return Injection(model, plans, adapters, rows, unused, frozen, replaced, settings, origin)


def _replaced(
    model: nn.Module,
    plans: Sequence[Plan],
    adapters: Sequence[Mapping[str, Tensor]],
    rows: Rows | None,
) -> tuple[Replacement, ...]:
    """What is replaced for the whole call; in a fold nothing is, since every adapter differs."""
    everywhere = [site for site in plans[0].sites if site.everywhere]
    if rows is not None or not everywhere:
        return ()
    return replacements(uncompiled(model), everywhere, adapters[0])
