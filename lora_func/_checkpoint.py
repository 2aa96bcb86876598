"""Activation checkpointing: what recomputes a part of a model recomputes it with its adapter.

``torch.utils.checkpoint.checkpoint`` runs its function again in the backward pass, when the call
that put the adapter into the model has long returned. While an adapter is at work we stand in for
it: without transforms torch's own does the work, on a function that puts the adapter back; under
the transforms of torch.func, which torch's does not know, we recompute ourselves.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint, noop_context_fn

from lora_func._remat import rematerialised, surroundings
from lora_func._running import Run, Work, is_running, run_here
from lora_func._slots import Put
from lora_func._transforms import WhileNeeded, transformed

# checkpoint itself is bound by name all over; what it calls is looked up here each time
_torchs_own: Any = checkpoint.__wrapped__  # type: ignore[attr-defined]
_SETTINGS = ("preserve_rng_state", "determinism_check", "debug", "early_stop")


def _checkpointed(
    function: Callable[..., Any], *args: Any, use_reentrant: bool | None = None, **kwargs: Any
) -> Any:
    run = run_here()
    if run is None or run.work is None or not torch.is_grad_enabled():
        return _torchs_own(function, *args, use_reentrant=use_reentrant, **kwargs)
    if use_reentrant is not False:
        raise RuntimeError(
            f"checkpoint(use_reentrant={use_reentrant}): a reentrant checkpoint gives the adapter "
            "no gradient; pass use_reentrant=False"
        )
    work = run.work.below(_module_of(function))
    if transformed():
        return _recomputed(work, function, args, kwargs)
    again = partial(_with_adapter, run, work, function)
    return _torchs_own(again, *args, use_reentrant=False, **kwargs)


intercepted = WhileNeeded(
    lambda: Put([(vars(_torchs_own), "__dynamo_disable", _checkpointed)]),
)
"""The setting in which checkpoints know of adapters."""


def _with_adapter(
    run: Run, work: Work, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if is_running(run.origin):
        return function(*args, **kwargs)
    return work.redo(work.tensors, function, args, kwargs)


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
    if any(True for _ in _captured(function)):
        # what a closure holds could not be differentiated; kept activations are right, if larger
        return function(*args, **kwargs)
    return _rematerialised(work, function, args, kwargs)


def _rematerialised(
    work: Work, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    values, layout = tree_flatten((args, kwargs))
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    inputs = [values[i] for i in places]
    found: list[Any] = []

    def first(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(places, tensors, strict=False))
        args, kwargs = tree_unflatten([given.get(i, v) for i, v in enumerate(values)], layout)
        output = work.redo(tensors[len(places) :], function, args, kwargs)
        found[:] = tree_flatten(output)
        mine = {id(tensor) for tensor in tensors}
        return tuple(
            value.view_as(value) if id(value) in mine else value
            for value in found[0]
            if isinstance(value, Tensor)
        )

    as_they_were = surroundings(inputs)

    def again(*tensors: Tensor) -> tuple[Tensor, ...]:
        with as_they_were():
            return first(*tensors)

    outputs = iter(rematerialised(first, again, [*inputs, *work.tensors]))
    output, its_layout = found
    output = [next(outputs) if isinstance(value, Tensor) else value for value in output]
    return tree_unflatten(output, its_layout)


def _module_of(function: Callable[..., Any]) -> nn.Module | None:
    """The module that a checkpointed function runs, as far as it shows."""
    while isinstance(function, partial):
        for value in function.args:
            if isinstance(value, nn.Module):
                return value
        function = function.func
    owner = getattr(function, "__self__", function)
    return owner if isinstance(owner, nn.Module) else None


def _captured(function: Callable[..., Any]) -> Iterator[Tensor]:
    """The tensors in a function's closure, and in those of the functions there."""
    pending: list[Any] = [getattr(function, "__func__", function)]
    known = set()
    while pending:
        found = pending.pop()
        for cell in getattr(found, "__closure__", None) or ():
            if id(cell) in known or not _is_full(cell):
                continue
            known.add(id(cell))
            content = cell.cell_contents
            if isinstance(content, FunctionType):
                pending.append(content)
            yield from (leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor))


def _is_full(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
