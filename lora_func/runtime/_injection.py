"""Injecting adapters into a live model for the length of a call, and removing them again."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_func.compat import PARAMETERS, transformed
from lora_func.modules import called_model, inner_model, original_parameters, sharding
from lora_func.runtime._base import PartOfCall, detached, tracker_of, trainable_parameters
from lora_func.runtime._checkpoint import intercepted_checkpoints
from lora_func.runtime._checks import check_single_axes, check_transformable, check_unattached
from lora_func.runtime._layout import ModelLayout, layout_of, present
from lora_func.runtime._leaves import AdapterLeaves, leaves_for_call
from lora_func.runtime._losses import LossPerAdapter, Rows
from lora_func.runtime._notes import noted
from lora_func.runtime._overrides import CallState, ForwardOverride, override_forward
from lora_func.runtime._parallel import InnerForward
from lora_func.runtime._patches import Patch, patched
from lora_func.runtime._replacements import Replacement, replaced_for_call
from lora_func.runtime._rows import Part, PassThrough, StackedForward
from lora_func.runtime._running import ActiveCall, active, check_first, is_active
from lora_func.runtime._settings import (
    cached_weights,
    compiled_attention,
    settings_now,
    transformable,
)
from lora_func.runtime._site import Site
from lora_func.runtime._sites import SingleForward


@dataclass(frozen=True, eq=False)
class Injection:
    """What is injected into a model for a call; it can be injected again to repeat a part of it.

    Attributes:
        model: The model, as the caller gave it.
        layouts: The layout of each adapter.
        adapters: One adapter for all rows; with ``rows`` stacks of adapters.
        leaves: The leaves of each adapter; a repetition without other tensors shares them.
        prepares: Whether they were prepared.
        rows: Which rows belong to which adapter; None for one adapter.
        unused: For each adapter, the keys that nothing has used yet; None while compiling.
        detaches: True if base parameters get no gradient.
        frozen: The base parameters that would get one; those of adapted modules are in trackers.
        replaced: The parameters that are replaced for the whole call. They are computed once, so
            that a repetition has the same tensors.
        settings: The settings that the transforms around the call need.
        losses: Splits losses by adapter, if several adapters share the call.
        origin: The call.
    """

    model: nn.Module
    layouts: tuple[ModelLayout, ...]
    adapters: tuple[Mapping[str, Tensor], ...]
    leaves: tuple[AdapterLeaves, ...]
    prepares: bool
    rows: Rows | None
    unused: tuple[set[str] | None, ...]
    detaches: bool
    frozen: Mapping[str, Tensor]
    replaced: tuple[Replacement, ...]
    settings: tuple[Patch, ...]
    losses: LossPerAdapter | None
    origin: object

    @property
    def tensors(self) -> list[Tensor]:
        """The adapters' tensors."""
        return [tensor for adapter in self.adapters for tensor in adapter.values()]

    def below(self, module: nn.Module | None) -> "Injection":
        """Return the part that goes into one module of the model; None means all of it."""
        if module is None:
            return self
        layouts = tuple(layout.inside(module) for layout in self.layouts)
        adapters = tuple(
            {key: adapter[key] for site in layout.sites for key in site.keys.values()}
            for layout, adapter in zip(layouts, self.adapters, strict=True)
        )
        return replace(self, layouts=layouts, adapters=adapters)

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the model while the adapter is injected."""
        frozen = {name: detached(parameter) for name, parameter in self.frozen.items()}
        with noted(self.model):
            return functional_call(self.model, frozen, tuple(args), {**kwargs}, tie_weights=False)

    def repeat(
        self,
        tensors: Sequence[Tensor] | None,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Call a function while the adapter is injected, with other tensors if they are given."""
        again = self
        if tensors is not None:
            values = iter(tensors)
            adapters = tuple({key: next(values) for key in one} for one in self.adapters)
            replaced = self.replaced and replaced_for_call(
                inner_model(self.model), self.layouts[0], adapters[0]
            )
            leaves = leaves_for_call(self.model, self.layouts, adapters, self.prepares, self.rows)
            again = replace(self, adapters=adapters, replaced=replaced, leaves=leaves)
        with again.inside():
            part = PartOfCall(self.model, function)
            frozen = {f"model.{name}": detached(one) for name, one in self.frozen.items()}
            return functional_call(part, frozen, tuple(args), {**kwargs}, tie_weights=False)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Inject the adapter; afterwards the model is what it was, whatever happened."""
        compiling, again = torch.compiler.is_compiling(), is_active(self.origin)
        call = CallState(self.unused[0], None if compiling else self.losses, sharding(self.model))
        patches = self._compiled_patches(call) if compiling else self._patches(call)
        try:
            with (
                nullcontext() if again or self.losses is None else self.losses,
                compiled_attention() if compiling else nullcontext(),
                patched(patches),
            ):
                yield
        finally:
            call.live = False

    def _patches(self, call: CallState) -> Iterator[Patch]:
        yield from self.settings
        token, layout = object(), self.layouts[0]
        changed = frozenset[int]().union(*(layout.changed for layout in self.layouts))
        settings = (layout.structure.identities, self.origin, self, threading.get_ident())
        yield active, token, ActiveCall(changed, *settings)
        check_first(token)
        if transformed():
            yield from transformable(self.model)
        for module in present(layout.recurrent):
            yield from cached_weights(module)
        replaced = {id(one.module): one for one in self.replaced}
        for patch in self._overrides(call):
            yield patch
            place, _, override = patch
            if isinstance(place, InnerForward):
                yield vars(override.module), "forward", place.run_recorded
            if isinstance(override, (SingleForward, StackedForward)):
                module = override.module
                one = replaced.pop(id(module), None)
                own = tracker_of(module, self.detaches, override, one, call)
                yield vars(module), PARAMETERS, own
        for one in replaced.values():
            own = tracker_of(one.module, self.detaches, None, one, call)
            yield vars(one.module), PARAMETERS, own

    def _compiled_patches(self, call: CallState) -> Iterator[Patch]:
        yield from self._overrides(call)
        for module, new, _ in self.replaced:
            own = original_parameters(module)
            yield from ((own, name, tensor) for name, tensor in new.items())

    def _overrides(self, call: CallState) -> Iterator[Patch]:
        """The forwards that modules run in place of their own."""
        rows = self.rows
        for path, reference in self.layouts[0].quantised:
            settings = (ForwardOverride,) if rows is None else (PassThrough, rows)
            if (module := reference()) is not None:
                yield override_forward(module, path, *settings)
        yield from self._single(call) if rows is None else self._stacked(rows, call)

    def _single(self, call: CallState) -> Iterator[Patch]:
        (leaves,) = self.leaves
        for sites in self.layouts[0].acting:
            module = sites[0].reference()
            assert module is not None
            yield override_forward(module, sites[0].path, SingleForward, sites, leaves, call)

    def _stacked(self, rows: Rows, call: CallState) -> Iterator[Patch]:
        found: dict[nn.Module, list[Sequence[Site]]] = {}
        for i, layout in enumerate(self.layouts):
            for sites in layout.groups:
                nowhere: list[Sequence[Site]] = [()] * len(self.layouts)
                found.setdefault(sites[0].module, nowhere)[i] = sites
        for module, of_all in found.items():
            path = ", ".join({site.path: None for sites in of_all for site in sites})
            parts = [*map(Part, rows.sizes, of_all, self.leaves, self.unused)]
            yield override_forward(module, path, StackedForward, rows, parts, call)


def injection(
    model: nn.Module,
    adapters: Sequence[Mapping[str, Tensor]],
    rows: Rows | None = None,
    *,
    detaches: bool = True,
    prepares: bool = False,
    origin: object = None,
) -> Injection:
    """Prepare an injection.

    Args:
        model: The model.
        adapters: One adapter for all rows; with ``rows`` stacks of adapters.
        rows: Which rows belong to which adapter.
        detaches: Whether base parameters that require grad get no gradient.
        prepares: Whether leaves are prepared now, and later changes of them are not seen.
        origin: The call that this is a part of, if it is.

    Returns:
        The injection, for the transforms that are active now.

    Raises:
        KeyError: If a key names no module or parameter of the model, or no variant.
        TypeError: If a variant cannot adapt what a key names, or the user's own function stands
            in the place of a forward.
        ValueError: If two variants name one module, or a leaf has the axes of a stack.
        RuntimeError: If the model cannot run under the active transforms.
    """
    model = called_model(model)
    layouts = tuple(layout_of(inner_model(model), adapter) for adapter in adapters)
    adapters = tuple({**adapter} for adapter in adapters)
    check_unattached(model, layouts[0].attached if layouts[0].sites else None)
    if rows is None:
        check_single_axes(layouts[0], adapters[0])
    check_transformable(layouts[0], model)
    compiling = torch.compiler.is_compiling()
    replaced: tuple[Replacement, ...] = ()
    if rows is None:  # rows of different adapters have their own parameters, module by module
        replaced = replaced_for_call(inner_model(model), layouts[0], adapters[0])
    unused: tuple[set[str] | None, ...] = (None,) * len(layouts)
    settings: tuple[Patch, ...] = ()
    if not compiling:
        unused = tuple(set(layout.keys) for layout in layouts)
        settings = (intercepted_checkpoints(), *settings_now(layouts[0].fast_path))
        origin = origin or object()
    detaches = detaches and (compiling or layouts[0].structure.requires_grad())
    frozen: Mapping[str, Tensor] = {}
    if detaches:
        modules = [site.module for layout in layouts for site in layout.sites]
        modules += [one.module for one in replaced]
        tracked = set() if compiling else {id(module) for module in modules}
        frozen = trainable_parameters(model, tracked, replaced)
    leaves = leaves_for_call(model, layouts, adapters, prepares, rows)
    losses = None if rows is None else LossPerAdapter(rows)
    state = (unused, detaches, frozen, replaced, settings, losses, origin)
    return Injection(model, layouts, adapters, leaves, prepares, rows, *state)
