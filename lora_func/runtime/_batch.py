"""The arguments that a batch stands for, and the result of a call."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

LossFn: TypeAlias = Callable[[Any, Any], Any]
"""Called as ``loss_fn(output, batch)``."""


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that a batch stands for.

    Raises:
        TypeError: If the batch is of another type than a mapping, a tuple, a list or a tensor.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise TypeError(
        f"batch: got {type(batch).__name__}, expected a mapping, a tuple, a list or a tensor"
    )


def result(output: Any, batch: Any, loss_fn: LossFn | None) -> Any:
    """Return ``loss_fn(output, batch)``; without loss_fn the output's loss, or else the output."""
    if loss_fn is not None:
        return loss_fn(output, batch)
    loss = getattr(output, "loss", None)
    return output if loss is None else loss
