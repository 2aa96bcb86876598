"""Putting an adapter into a live model for the length of a call, and taking it out again."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lora_func._plan import Plan, Site, plan_of
from lora_func._threads import owned
from lora_func._transforms import environment, uncompiled
from lora_func._types import Params
from lora_func._weight import affine

Forward: TypeAlias = Callable[..., Any]

_ABSENT = object()

Slot: TypeAlias = tuple[dict[str, Any], str, Any]
"""A dict, a key in it, and the value to put there."""


@contextmanager
def injected(model: nn.Module, params: Params) -> Iterator[set[str]]:
    """Put an adapter into a model; afterwards the model is what it was, whatever happened.

    Args:
        model: The model.
        params: The adapter.

    Yields:
        The paths of the sites that have not run yet.

    Raises:
        KeyError: If a key names no module of the model or no variant.
        TypeError: If a variant cannot adapt the module that a key names.
        ValueError: If two variants name one module.
        RuntimeError: If activation checkpointing is on.
        ConcurrentCallError: If another thread is running this model with an adapter.
    """
    plan = plan_of(uncompiled(model), params)
    unreached = {site.path for site in plan.sites}
    forwards = [_slot(site, params, unreached) for site in plan.sites]
    if torch.compiler.is_compiling():
        with _put(forwards):
            yield set()
    else:
        _refuse_checkpointing(plan)
        with owned(plan.modules), environment(plan.fast_path), _put(forwards):
            yield unreached


@contextmanager
def _put(slots: Iterable[Slot]) -> Iterator[None]:
    """Write into dicts, and restore what they held."""
    found: list[Slot] = []
    try:
        for place, name, value in slots:
            found.append((place, name, place.get(name, _ABSENT)))
            place[name] = value
        yield
    finally:
        for place, name, value in reversed(found):
            if value is _ABSENT:
                place.pop(name, None)
            else:
                place[name] = value


def _slot(site: Site, params: Params, unreached: set[str]) -> Slot:
    module = site.module()
    assert module is not None
    leaves = {
        leaf: params[key].detach() if leaf.startswith("_") else params[key]
        for leaf, key in site.keys.items()
    }
    # accelerate's hooks live in "forward" and call "_old_forward"
    name = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    found = module.__dict__.get(name)
    if getattr(found, "__module__", __name__) == __name__:  # nothing, or an outer injection
        found = None
    if site.variant.parameters is not None:
        run = _with_parameters(module, found or type(module).forward.__get__(module), site, leaves)
    elif found is None or name == "_old_forward":
        run = _with_activations(module, site, leaves)
    else:
        raise TypeError(
            f"{site.path}: its forward was replaced on the instance, by {found!r}, which "
            f"{site.variant.name} would bypass; remove that, or leave the site out of the adapter"
        )
    return module.__dict__, name, _reporting(run, site, unreached)


def _with_activations(module: nn.Module, site: Site, leaves: dict[str, Tensor]) -> Forward:
    apply = site.variant.apply

    def forward(input: Tensor) -> Tensor:
        return apply(affine(module), leaves, input)

    return forward


def _with_parameters(
    module: nn.Module, original: Forward, site: Site, leaves: dict[str, Tensor]
) -> Forward:
    own: dict[str, Any] = module._parameters
    parameters = site.variant.parameters
    assert parameters is not None

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _put((own, name, tensor) for name, tensor in parameters(own, leaves).items()):
            return original(*args, **kwargs)

    return forward


def _reporting(run: Forward, site: Site, unreached: set[str]) -> Forward:
    """Note that the site ran, and name it in whatever goes wrong there."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        unreached.discard(site.path)
        try:
            return run(*args, **kwargs)
        except Exception as error:
            error.add_note(f"in the {site.variant.name} adapter of {site.path!r}")
            raise

    return forward


def _refuse_checkpointing(plan: Plan) -> None:
    if not torch.is_grad_enabled():
        return
    for reference in plan.checkpointing:
        module = reference()
        if module is not None and module.gradient_checkpointing and module.training:
            raise RuntimeError(
                f"{type(module).__name__}: activation checkpointing is on, and would recompute the "
                "layer without its adapter; call model.activation_checkpointing_disable() first"
            )
