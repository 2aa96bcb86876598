"""Folding the adapter axis into the rows of a batch, and unfolding it from an output."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_func.compat import is_cache, tree_flatten, tree_map, tree_map_only, tree_unflatten
from lora_func.errors import FoldError
from lora_func.runtime import (
    PLAIN,
    LossFn,
    PerAdapter,
    arguments,
    result,
    stacked,
    tensors_of,
    unstacked,
)
from lora_func.sweep._caches import part_of_cache


def batch_of(batch: Any, batched: bool, at: int | slice) -> Any:
    """Return the batch of one adapter, or of several.

    Args:
        batch: As for ``vcall``.
        batched: Whether each adapter has its own.
        at: The index of the adapter, or a slice.
    """
    if not batched:
        return batch
    return of_adapter(_plain(batch), at)


def copied(batch: Any) -> Any:
    """Return a copy of a batch, which a model may write to."""
    return tree_map_only(Tensor, torch.clone, _plain(batch))


def _plain(batch: Any) -> Any:
    return dict(batch) if isinstance(batch, Mapping) else batch


def check_batched_axes(batch: Any, adapters: int) -> None:
    """Check that a batch holds one batch for each adapter.

    Args:
        batch: As for ``vcall`` with ``batched=True``.
        adapters: The number of adapters.

    Raises:
        ValueError: If a tensor has other axes than (adapters, rows, ...).
    """
    shapes = [tuple(tensor.shape) for tensor in tensors_of(arguments(batch))]
    if any(len(shape) < 2 or shape[0] != adapters for shape in shapes):
        raise ValueError(
            f"batch: tensors of shapes {shapes}; with batched=True each has the axes (adapters, "
            f"rows, ...), here ({adapters}, rows, ...)"
        )


def rows_of(batch: Any, batched: bool) -> int:
    """Count the rows of one adapter's batch.

    Args:
        batch: As for ``vcall``.
        batched: Whether each adapter has its own batch.

    Returns:
        The common number of rows; a tensor with a single row is shared by all.

    Raises:
        FoldError: If the tensors have no common number of rows on their first axis.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors_of(arguments(batch)) if tensor.ndim]
    counts = {shape[1 if batched else 0] for shape in shapes}
    rows = max(counts, default=0)
    if not counts or not counts <= {rows, 1}:
        raise FoldError(
            f"batch: tensors of shapes {shapes}; to be shared, all must have the same number of "
            "rows on their first axis"
        )
    return rows


def fold_batch(batch: Any, adapters: int, batched: bool) -> tuple[Any, Any, int]:
    """Lay the rows of all adapters one after another.

    Args:
        batch: As for ``vcall``.
        adapters: The number of adapters.
        batched: Whether each adapter has its own batch.

    Returns:
        Positional arguments, keyword arguments, and the number of rows of each adapter.

    Raises:
        FoldError: If the tensors have no common number of rows on their first axis.
    """
    rows = rows_of(batch, batched)
    values, layout = tree_flatten(arguments(batch))
    for i, value in enumerate(values):
        if not isinstance(value, Tensor) or not value.ndim:
            continue
        if batched:
            values[i] = value.expand(-1, rows, *value.shape[2:]).flatten(0, 1)
        elif value.shape[0] == rows:
            values[i] = value.repeat(adapters, *[1] * (value.ndim - 1))
    args, kwargs = tree_unflatten(values, layout)
    return args, kwargs, rows


def results(
    output: Any,
    batch: Any,
    adapters: int,
    rows: int,
    batched: bool,
    loss_fn: LossFn | None,
    split: Sequence[Tensor],
) -> Any:
    """Return the stacked results that ``fcall`` would give for each adapter.

    Args:
        output: The model's output for all rows.
        batch: As for ``vcall``.
        adapters: The number of adapters.
        rows: The number of rows of each adapter.
        batched: Whether each adapter has its own batch.
        loss_fn: As for ``fcall``.
        split: Losses that have one number for each adapter.

    Raises:
        FoldError: If the shares of the adapters cannot be separated.
    """
    if getattr(output, "aux_loss", None) is not None:
        raise FoldError(
            "the model adds an auxiliary loss over the rows of all adapters; switch it off "
            "(output_router_logits=False)"
        )
    loss = getattr(output, "loss", None)
    numbers = split if loss is None else [*split, loss]
    if loss_fn is None:
        return unfold(result(output, batch, None), adapters, rows, numbers)
    output = unfold(output, adapters, rows, numbers)
    outputs = unstacked(output, adapters)
    return stacked([loss_fn(own, batch_of(batch, batched, k)) for k, own in enumerate(outputs)])


def unfold(output: Any, adapters: int, rows: int, numbers: Sequence[Tensor]) -> Any:
    """Give a model's output an axis of adapters in front.

    Args:
        output: The model's output for all rows.
        adapters: The number of adapters.
        rows: The number of rows of each adapter.
        numbers: The parts of it that have one number for each adapter.

    Returns:
        The same with tensors of shape (adapters, rows, ...); (adapters,) for a part with one
        number for each adapter, such as a loss; a list of K caches for a cache.

    Raises:
        FoldError: If a part is neither a tensor with rows nor a plain value.
    """

    def unfolded(value: Any) -> Any:
        if isinstance(value, PLAIN):
            return value
        if is_cache(value):
            return PerAdapter(part_of_cache(value, k, adapters, rows) for k in range(adapters))
        if not isinstance(value, Tensor):
            raise FoldError(
                f"the model gives a {type(value).__name__}, whose parts are unknown; "
                "register it with torch.utils._pytree.register_pytree_node"
            )
        is_number = rows != 1 or any(value is number for number in numbers)
        if value.shape == (adapters,) and is_number:
            return value
        if not value.ndim or value.shape[0] % max(adapters * rows, 1):
            raise FoldError(
                f"the model gives a tensor of shape {tuple(value.shape)} over the rows of "
                f"{adapters} adapters, which cannot be separated; if it is a loss, pass loss_fn, "
                "and leave the labels out of what the model sees"
            )
        return value.reshape(adapters, value.shape[0] // adapters, *value.shape[1:])

    return tree_map(unfolded, output)


def of_adapter(output: Any, k: int | slice) -> Any:
    """Return the part of one adapter, or of several, of tensors with adapters on the first axis."""
    return tree_map_only((Tensor, PerAdapter), lambda value: value[k], output)
