"""Calling a frozen model with an adapter."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from lora_func._errors import UnreachedSiteError
from lora_func._inject import injected
from lora_func._types import Params


def fcall(
    model: nn.Module,
    params: Params,
    batch: Any,
    *,
    loss_fn: Callable[[Any, Any], Any] | None = None,
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

    Returns:
        What loss_fn returns; without one ``output.loss`` where the output has it, else the output
        itself.

    Raises:
        TypeError: If batch is of another kind, or a variant cannot adapt the module that a key
            names.
        KeyError: If a key names no module of the model, or no variant.
        ValueError: If two variants name one module.
        RuntimeError: If activation checkpointing is on.
        ConcurrentCallError: If another thread is running this model with an adapter; see
            ``skeleton``.
        UnreachedSiteError: If an adapted module never ran.

    Example:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> params, x = lf.init(model, lf.LoRA(r=2)), torch.ones(3, 4)
        >>> loss = lf.fcall(model, params, x, loss_fn=lambda y, x: y.square().mean())
        >>> (gradient,) = torch.autograd.grad(loss, params["0.lora.B"])
    """
    args, kwargs = _arguments(batch)
    frozen = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    with injected(model, params) as unreached:
        output = functional_call(model, frozen, args, kwargs) if frozen else model(*args, **kwargs)
    if unreached:
        raise UnreachedSiteError(
            f"{len(unreached)} adapted modules never ran in this call, such as {min(unreached)!r}, "
            "so their adapters had no effect: the model skips them or reads their weights past "
            "them; leave them out of the adapter"
        )
    if loss_fn is not None:
        return loss_fn(output, batch)
    loss = getattr(output, "loss", None)
    return output if loss is None else loss


@contextmanager
def adapted(model: nn.Module, params: Params) -> Iterator[nn.Module]:
    """Run a model with an adapter inside a ``with`` block, for ``generate()`` and evaluation.

    It is the injection of ``fcall`` without the call: parameters of the base that require grad get
    gradients, and a module that never runs is no error.

    Args:
        model: The model; afterwards it is what it was, whatever happened.
        params: The adapter.

    Yields:
        The model.

    Raises:
        TypeError: If a variant cannot adapt the module that a key names.
        KeyError: If a key names no module of the model, or no variant.
        ValueError: If two variants name one module.
        RuntimeError: If activation checkpointing is on.
        ConcurrentCallError: If another thread is running this model with an adapter.

    Example:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> with lf.adapted(model, lf.init(model, lf.LoRA(r=2))):
        ...     output = model(torch.ones(1, 4))
    """
    with injected(model, params):
        yield model


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise TypeError(
        f"batch: got {type(batch).__name__}, expected a mapping, a tuple, a list or a tensor"
    )
