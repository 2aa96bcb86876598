"""Activation checkpointing: what recomputes a part of a model recomputes it with its adapter.

``torch.utils.checkpoint.checkpoint`` runs its function again in the backward pass, when the call
that put the adapter into the model has long returned. While an adapter is at work we stand in for
it: without transforms torch's own does the work, on a function that puts the adapter back; under
the transforms of torch.func, which torch's does not know, we recompute ourselves.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint, noop_context_fn

from lora_func.runtime._patches import Put
from lora_func.runtime._rematerialize import rematerialised, surroundings
from lora_func.runtime._running import Run, Work, is_running, runs_here
from lora_func.runtime._transforms import WhileNeeded, active_transforms, transformed
from lora_func.runtime._trees import tensors_of

# checkpoint itself is bound by name all over; what it calls is looked up here each time
_torchs_own: Any = checkpoint.__wrapped__  # type: ignore[attr-defined]
_SETTINGS = ("preserve_rng_state", "determinism_check", "debug", "early_stop")
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, nn.Module)


def _checkpointed(
    function: Callable[..., Any], *args: Any, use_reentrant: bool | None = None, **kwargs: Any
) -> Any:
    runs = runs_here()
    if not runs or not torch.is_grad_enabled():
        return _torchs_own(function, *args, use_reentrant=use_reentrant, **kwargs)
    if use_reentrant is not False:
        raise RuntimeError(
            f"checkpoint(use_reentrant={use_reentrant}): a reentrant checkpoint gives the adapter "
            "no gradient; pass use_reentrant=False"
        )
    if transformed():
        assert runs[-1].work is not None
        return _recomputed(runs[-1].work, function, args, kwargs)
    for run in runs:
        function = partial(_with_adapter, run, function)
    return _torchs_own(function, *args, use_reentrant=False, **kwargs)


intercepted = WhileNeeded(
    lambda: Put([(vars(_torchs_own), "__dynamo_disable", _checkpointed)]),
)
"""The setting in which checkpoints know of adapters."""


def _with_adapter(run: Run, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if run.work is None or is_running(run.origin):
        return function(*args, **kwargs)
    return run.work.redo(None, function, args, kwargs)


def _recomputed(
    work: Work, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
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
        if not active_transforms():  # a dual level, in which torch.func.jvp cannot nest
            raise _UnseenError
        return _rematerialised(work.below(_module_of(function, args)), function, args, kwargs)
    except _UnseenError:
        # it depends on more than its arguments: kept activations are right, if larger
        return function(*args, **kwargs)


def _rematerialised(
    work: Work, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    values, layout = tree_flatten((args, kwargs))
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    inputs = [values[i] for i in places]
    shape: list[Any] = []

    def again(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(places, tensors, strict=False))
        args, kwargs = tree_unflatten([given.get(i, v) for i, v in enumerate(values)], layout)
        output = work.redo(tensors[len(places) :], function, args, kwargs)
        parts, its_layout = tree_flatten(output)
        _require_plain(parts)
        # no tensor, which would keep all that it was computed from
        shape[:] = [None if isinstance(p, Tensor) else (p,) for p in parts], its_layout
        return tuple(part for part in parts if isinstance(part, Tensor))

    def first(*tensors: Tensor) -> tuple[Tensor, ...]:
        versions = [tensor._version for tensor in tensors]
        with _NothingUnseen(tensors):
            outputs = again(*tensors)
        if [tensor._version for tensor in tensors] != versions:
            raise RuntimeError("a checkpointed function writes into its input; let it make a copy")
        return outputs

    def as_at_first(*tensors: Tensor) -> tuple[Tensor, ...]:
        with as_they_were():
            return again(*tensors)

    _require_plain(values)
    as_they_were = surroundings(inputs)
    outputs = iter(rematerialised(first, as_at_first, [*inputs, *work.tensors]))
    parts, its_layout = shape
    return tree_unflatten([next(outputs) if p is None else p[0] for p in parts], its_layout)


class _UnseenError(Exception):
    """A function depends on what cannot be handed to it."""


def _require_plain(values: Sequence[Any]) -> None:
    if not all(isinstance(value, (Tensor, *_PLAIN)) for value in values):
        raise _UnseenError


class _NothingUnseen(TorchFunctionMode):
    """Finds tensors that might be differentiated, and come from elsewhere than the inputs."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {tensor._cdata for tensor in inputs}
        self.alive: list[Any] = []  # so that no other tensor gets the identity of one

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(map(self._is_unseen, tensors_of((args, kwargs)))):
            raise _UnseenError
        result = func(*args, **(kwargs or {}))
        self.known |= {tensor._cdata for tensor in tensors_of(result)}
        self.alive.append(result)
        return result

    def _is_unseen(self, tensor: Tensor) -> bool:
        level = torch._C._functorch.maybe_current_level()
        # -2 is the level of a transform that has ended
        if torch._C._functorch.maybe_get_level(tensor) not in range(-1, 1 + (level or 0)):
            return True
        is_constant = not tensor.requires_grad
        while tensor._cdata not in self.known:
            if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                return not is_constant
            tensor, is_constant = torch._C._functorch.get_unwrapped(tensor), False
        return False


def _module_of(function: Callable[..., Any], args: Sequence[Any]) -> nn.Module | None:
    """The module of which a checkpointed function is a method, bound or not."""
    owner = getattr(function, "__self__", function)
    if isinstance(owner, nn.Module):
        return owner
    first = args[0] if args else None
    is_method = getattr(type(first), getattr(function, "__name__", ""), None) is not None
    return first if isinstance(first, nn.Module) and is_method else None
