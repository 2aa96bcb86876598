"""Activation checkpointing: a recomputed part of a model runs with its adapter again.

``torch.utils.checkpoint.checkpoint`` runs its function again in the backward pass, after the call
that injected the adapter has returned. While an adapter is injected this module takes its place.
Without transforms torch's own checkpoint runs a function that injects the adapter again. Under the
transforms of torch.func, which torch's checkpoint does not support, ``_rematerialize`` recomputes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import noop_context_fn

from lora_func.compat import (
    CHECKPOINT_PATCH,
    active_transforms,
    identity_of,
    is_alive,
    is_wrapped,
    torch_checkpoint,
    transformed,
    tree_flatten,
    tree_unflatten,
    unwrapped,
    version_of,
)
from lora_func.runtime._patches import Patch, RefCountedSetting
from lora_func.runtime._rematerialize import rematerialized, surroundings
from lora_func.runtime._running import ActiveCall, Repeatable, calls_here, is_active
from lora_func.runtime._trees import tensors_of

_SETTINGS = ("preserve_rng_state", "determinism_check", "debug", "early_stop")
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, nn.Module)


def _checkpointed(
    function: Callable[..., Any], *args: Any, use_reentrant: bool | None = None, **kwargs: Any
) -> Any:
    calls = calls_here()
    if not calls or not torch.is_grad_enabled():
        return torch_checkpoint(function, *args, use_reentrant=use_reentrant, **kwargs)
    if use_reentrant is not False:
        raise RuntimeError(
            f"checkpoint(use_reentrant={use_reentrant}): a reentrant checkpoint gives the adapter "
            "no gradient; pass use_reentrant=False"
        )
    if transformed():
        assert calls[-1].injection is not None
        return _recomputed(calls[-1].injection, function, args, kwargs)
    for call in calls:
        function = partial(_with_adapter, call, function)
    return torch_checkpoint(function, *args, use_reentrant=False, **kwargs)


_PLACE, _NAME = CHECKPOINT_PATCH
_ABSENT = object()


def _write(function: Any) -> None:
    if function is _ABSENT:
        _PLACE.pop(_NAME, None)
    else:
        _PLACE[_NAME] = function


_intercepted = RefCountedSetting[Any](lambda: _PLACE.get(_NAME, _ABSENT), _write, _checkpointed)


def intercepted_checkpoints() -> Patch:
    """Return the patch during which checkpoints run with the injected adapter."""
    return _intercepted, object(), True


def _with_adapter(call: ActiveCall, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if call.injection is None or is_active(call.origin):
        return function(*args, **kwargs)
    return call.injection.repeat(None, function, args, kwargs)


def _recomputed(
    injection: Repeatable,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    kwargs = {name: value for name, value in kwargs.items() if name not in _SETTINGS}
    if kwargs.pop("context_fn", noop_context_fn) is not noop_context_fn:
        raise RuntimeError(
            "checkpoint(context_fn=...): selective checkpointing does not go with the transforms "
            "of torch.func; leave context_fn out"
        )
    while isinstance(function, partial):
        args = (*function.args, *args)
        kwargs = function.keywords | kwargs
        function = function.func
    try:
        if not active_transforms():  # torch.func.jvp cannot nest in a dual level of autograd
            raise _UnseenError
        return _rematerialize(injection.below(_module_of(function, args)), function, args, kwargs)
    except _UnseenError:
        # the function depends on more than its arguments: keep its activations
        return function(*args, **kwargs)


def _rematerialize(
    injection: Repeatable,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    values, layout = tree_flatten((args, kwargs))
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    inputs = [values[i] for i in places]
    shape: list[Any] = []

    def again(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(places, tensors, strict=False))
        args, kwargs = tree_unflatten([given.get(i, v) for i, v in enumerate(values)], layout)
        output = injection.repeat(tensors[len(places) :], function, args, kwargs)
        parts, its_layout = tree_flatten(output)
        _check_plain(parts)
        # keep no tensor: it would keep all that it was computed from
        shape[:] = [None if isinstance(p, Tensor) else (p,) for p in parts], its_layout
        return tuple(part for part in parts if isinstance(part, Tensor))

    def first(*tensors: Tensor) -> tuple[Tensor, ...]:
        versions = [version_of(tensor) for tensor in tensors]
        with _NothingUnseen(tensors):
            outputs = again(*tensors)
        if [version_of(tensor) for tensor in tensors] != versions:
            raise RuntimeError("a checkpointed function writes into its input; let it make a copy")
        return outputs

    def as_at_first(*tensors: Tensor) -> tuple[Tensor, ...]:
        with as_they_were():
            return again(*tensors)

    _check_plain(values)
    as_they_were = surroundings(inputs)
    outputs = iter(rematerialized(first, as_at_first, [*inputs, *injection.tensors]))
    parts, its_layout = shape
    return tree_unflatten([next(outputs) if p is None else p[0] for p in parts], its_layout)


class _UnseenError(Exception):
    """A function depends on a value that is not among its arguments."""


def _check_plain(values: Sequence[Any]) -> None:
    if not all(isinstance(value, (Tensor, *_PLAIN)) for value in values):
        raise _UnseenError


class _NothingUnseen(TorchFunctionMode):
    """Finds tensors that may need a derivative and are not computed from the inputs."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {identity_of(tensor) for tensor in inputs}
        self.alive: list[Any] = []  # keeps identities from being used again

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(map(self._is_unseen, tensors_of((args, kwargs)))):
            raise _UnseenError
        result = func(*args, **(kwargs or {}))
        self.known |= {identity_of(tensor) for tensor in tensors_of(result)}
        self.alive.append(result)
        return result

    def _is_unseen(self, tensor: Tensor) -> bool:
        if not is_alive(tensor):
            return True
        is_constant = not tensor.requires_grad
        while identity_of(tensor) not in self.known:
            if not is_wrapped(tensor):
                return not is_constant
            tensor, is_constant = unwrapped(tensor), False
        return False


def _module_of(function: Callable[..., Any], args: Sequence[Any]) -> nn.Module | None:
    """The module whose method a checkpointed function is, bound or not."""
    owner = getattr(function, "__self__", function)
    if isinstance(owner, nn.Module):
        return owner
    first = args[0] if args else None
    is_method = getattr(type(first), getattr(function, "__name__", ""), None) is not None
    return first if isinstance(first, nn.Module) and is_method else None
