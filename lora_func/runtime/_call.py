"""Calling a frozen model with an adapter."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lora_func.runtime._batch import LossFn, arguments, result
from lora_func.runtime._frozen import refuse_unused
from lora_func.runtime._injection import injection


def fcall(
    model: nn.Module,
    params: Mapping[str, Tensor],
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    strict: bool = True,
) -> Any:
    """Call a frozen model with an adapter: a pure function of the adapter.

    It serves autograd and every torch.func transform. The model runs as it is (hooks, train or eval
    mode, dtype, device) and is afterwards what it was, whatever happened. Nothing but the adapter's
    trained leaves gets a gradient.

    Args:
        model: The model.
        params: The adapter. Under ``torch.vmap(fcall, in_dims=(None, 0, None))`` a stack of them.
        batch: A mapping becomes keyword arguments, a tuple or list positional ones, a tensor the
            only one.
        loss_fn: Called as ``loss_fn(output, batch)``.
        strict: Whether a leaf that had no part in the call is an error. False is for models that
            drop layers at random or by their input.

    Returns:
        What loss_fn returns; without one ``output.loss`` where the output has it, else the output.

    Raises:
        TypeError: If batch is of another kind, or a variant cannot adapt a module.
        KeyError: If a key names no module or parameter of the model, or no variant.
        ValueError: If two variants name one module, or a leaf has not its axes, as in a stack.
        RuntimeError: If the model cannot run under the transforms around the call.
        BusyModelError: If the model is already running with an adapter; see ``skeleton``.
        UnusedLeafError: If an adapted module never ran, or a variant has no such leaf.

    Example:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> params, x = lf.init(model, lf.LoRA(r=2)), torch.ones(3, 4)
        >>> loss = lf.fcall(model, params, x, loss_fn=lambda y, x: y.square().mean())
        >>> (gradient,) = torch.autograd.grad(loss, params["0.lora.B"])
    """
    return call(model, params, batch, loss_fn, strict)


def call(
    model: nn.Module,
    params: Mapping[str, Tensor],
    batch: Any,
    loss_fn: LossFn | None,
    strict: bool,
    origin: object = None,
) -> Any:
    """Do what ``fcall`` does, as a part of another run if an origin is given."""
    args, kwargs = arguments(batch)
    work = injection(model, [params], origin=origin)
    with work.inside():
        output = work.call(args, kwargs)
    if strict:
        refuse_unused(work.unused)
    return result(output, batch, loss_fn)


@contextmanager
def adapted(model: nn.Module, params: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Run a model with an adapter inside a ``with`` block, for ``generate()`` and evaluation.

    It is the injection of ``fcall`` without the call: base parameters that require grad get
    gradients, a leaf without a part is no error, and transforms that begin inside find nothing
    switched for them.

    Args:
        model: The model; afterwards it is what it was, whatever happened.
        params: The adapter.

    Yields:
        The model.

    Raises:
        TypeError: If a variant cannot adapt the module that a key names.
        KeyError: If a key names no module or parameter of the model, or no variant.
        ValueError: If two variants name one module, or a leaf has not its axes, as in a stack.
        BusyModelError: If the model is already running with an adapter.

    Example:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> with lf.adapted(model, lf.init(model, lf.LoRA(r=2))):
        ...     output = model(torch.ones(1, 4))
    """
    with injection(model, [params], detached=False).inside():
        yield model
