"""Calling a frozen model with an adapter."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lora_func.compat import PRE_HOOKS
from lora_func.modules import inner_model
from lora_func.runtime._agreement import check_same_depth
from lora_func.runtime._batch import LossFn, arguments, result
from lora_func.runtime._injection import injection
from lora_func.runtime._overrides import Uncopied, check_used
from lora_func.runtime._patches import patched


def fcall(
    model: nn.Module,
    params: Mapping[str, Tensor],
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    strict: bool = True,
) -> Any:
    """Call a frozen model with an adapter: a pure function of the adapter.

    It works under autograd and every torch.func transform. The model runs with its own hooks, mode,
    dtype and device, and is afterwards what it was, whatever happened. Only the trained leaves of
    the adapter get gradients.

    An adapted module that is called runs the variant's ``apply``. Code that reads its weight
    without calling it, such as a tied layer, gets the adapted weight.

    Args:
        model: The model.
        params: The adapter. Under ``torch.vmap(fcall, in_dims=(None, 0, None))`` a stack of them.
        batch: A mapping gives keyword arguments, a tuple or list positional ones, a tensor the
            only argument.
        loss_fn: Called as ``loss_fn(output, batch)``.
        strict: Whether a leaf that had no part in the call is an error. Pass False for models that
            skip layers at random or by their input.

    Returns:
        The result of loss_fn; without loss_fn ``output.loss`` if there is one, else the output.

    Raises:
        TypeError: If batch has another type, or a variant cannot adapt a module.
        KeyError: If a key names no module or parameter of the model, or no variant.
        ValueError: If two variants name one module, a leaf has other axes, as in a stack, or the
            ranks of a sharded base adapt down to different layers.
        RuntimeError: If the model cannot run under the transforms around the call.
        BusyModelError: If the model is already running with an adapter (see ``skeleton``), or has
            one attached.
        UnusedLeafError: If an adapted module never ran, or a variant has no such leaf.

    Examples:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> params, x = lf.init(model, lf.LoRA(r=2)), torch.ones(3, 4)
        >>> loss = lf.fcall(model, params, x, loss_fn=lambda y, x: y.square().mean())
        >>> (gradient,) = torch.autograd.grad(loss, params["0.lora.B"])
    """
    check_same_depth(model, [params])
    return call(model, params, batch, loss_fn, strict)


def call(
    model: nn.Module,
    params: Mapping[str, Tensor],
    batch: Any,
    loss_fn: LossFn | None,
    strict: bool,
    origin: object = None,
) -> Any:
    """Do what ``fcall`` does, as a part of another call if an origin is given."""
    args, kwargs = arguments(batch)
    injected = injection(model, [params], prepares=True, origin=origin)
    with injected.inside():
        output = injected.call(args, kwargs)
    if strict:
        check_used(injected.unused)
    return result(output, batch, loss_fn)


class _Calls(Uncopied):
    """A hook that notes whether the model was called."""

    seen = False

    def __call__(self, module: nn.Module, args: object) -> None:
        self.seen = True


@contextmanager
def adapted(
    model: nn.Module, params: Mapping[str, Tensor], *, strict: bool = True
) -> Iterator[nn.Module]:
    """Run a model with an adapter inside a ``with`` block, for ``generate()`` and evaluation.

    It is the injection of ``fcall`` without the call. Base parameters that require grad get
    gradients. The settings for transforms are chosen when the block is entered, so put ``fcall``
    inside a transform, and no transform inside this block.

    Args:
        model: The model; afterwards it is what it was, whatever happened.
        params: The adapter.
        strict: Whether a leaf that had no part in the block is an error, raised at its end. A block
            that never called the model is no error.

    Yields:
        The model.

    Raises:
        TypeError: If a variant cannot adapt the module that a key names.
        KeyError: If a key names no module or parameter of the model, or no variant.
        ValueError: If two variants name one module, or a leaf has other axes, as in a stack.
        BusyModelError: If the model is already running with an adapter, or has one attached.
        UnusedLeafError: If an adapted module never ran while others did, or a variant has no such
            leaf.

    Examples:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> with lf.adapted(model, lf.init(model, lf.LoRA(r=2))):
        ...     output = model(torch.ones(1, 4))
    """
    injected, calls = injection(model, [params], detaches=False), _Calls()
    check_same_depth(model, [params])
    hooks = vars(inner_model(model))[PRE_HOOKS]
    with injected.inside(), patched([(hooks, id(calls), calls)]):
        yield model
    was_called = calls.seen or set(injected.unused[0] or ()) != injected.layouts[0].keys
    if strict and was_called:
        check_used(injected.unused)
