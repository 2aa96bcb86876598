"""The adapter axis folded into the rows of a batch, and unfolded from what a model gives."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

from lora_func.errors import FoldError
from lora_func.runtime._batch import LossFn, arguments, result
from lora_func.runtime._losses import is_split
from lora_func.runtime._trees import stacked, tensors_of, unstacked


def batch_of(batch: Any, batched: bool, at: int | slice) -> Any:
    """Return the batch of one adapter, or of several.

    Args:
        batch: As for ``vcall``.
        batched: Whether each adapter has its own.
        at: Whose.
    """
    if not batched:
        return batch
    return of_adapter(_plain(batch), at)


def copied(batch: Any) -> Any:
    """Return a batch into which a model may write."""
    return tree_map_only(Tensor, torch.clone, _plain(batch))


def _plain(batch: Any) -> Any:
    return dict(batch) if isinstance(batch, Mapping) else batch


def refuse_other_axes(batch: Any, adapters: int) -> None:
    """Refuse a batch that is none for each adapter.

    Args:
        batch: As for ``vcall`` with ``batched=True``.
        adapters: How many there are.

    Raises:
        ValueError: If a tensor has not the axes (adapters, rows, ...).
    """
    shapes = [tuple(tensor.shape) for tensor in tensors_of(arguments(batch))]
    if any(len(shape) < 2 or shape[0] != adapters for shape in shapes):
        raise ValueError(
            f"batch: tensors of shapes {shapes}; with batched=True each has the axes (adapters, "
            f"rows, ...), here ({adapters}, rows, ...)"
        )


def fold_batch(batch: Any, adapters: int, batched: bool) -> tuple[Any, Any, int]:
    """Lay the rows of all adapters one after another.

    Args:
        batch: As for ``vcall``.
        adapters: How many there are.
        batched: Whether each has a batch of its own.

    Returns:
        Positional arguments, keyword arguments, and the number of rows of each adapter.

    Raises:
        FoldError: If a tensor has its rows elsewhere than on the first axis.
    """
    values, layout = tree_flatten(arguments(batch))
    own = 1 if batched else 0
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.ndim]
    shapes = [tuple(values[i].shape) for i in places]
    counts = {shape[own] for shape in shapes}
    # one row for everybody, such as positions, is left to broadcasting
    rows = max(counts, default=0)
    if not counts or not counts <= {rows, 1}:
        raise FoldError(
            f"batch: tensors of shapes {shapes}; to be shared, all must have the same number of "
            "rows on their first axis"
        )
    for i in places:
        value = values[i]
        if batched:
            values[i] = value.expand(-1, rows, *value.shape[2:]).flatten(0, 1)
        elif value.shape[0] == rows:
            values[i] = value.repeat(adapters, *[1] * (value.ndim - 1))
    args, kwargs = tree_unflatten(values, layout)
    return args, kwargs, rows


def results(
    output: Any, batch: Any, adapters: int, rows: int, batched: bool, loss_fn: LossFn | None
) -> Any:
    """Return for each adapter what ``fcall`` would return for it, stacked.

    Args:
        output: What the model gave for all rows.
        batch: As for ``vcall``.
        adapters: How many there are.
        rows: How many rows each of them has.
        batched: Whether each has a batch of its own.
        loss_fn: As for ``fcall``.

    Raises:
        FoldError: If the adapters' shares cannot be told apart.
    """
    if getattr(output, "aux_loss", None) is not None:
        raise FoldError(
            "the model adds an auxiliary loss over the rows of all adapters; switch it off "
            "(output_router_logits=False)"
        )
    loss = getattr(output, "loss", None)
    if loss_fn is None:
        return unfold(result(output, batch, None), adapters, rows, loss)
    output = unfold(output, adapters, rows, loss)
    outputs = unstacked(output, adapters)
    return stacked([loss_fn(own, batch_of(batch, batched, k)) for k, own in enumerate(outputs)])


def unfold(output: Any, adapters: int, rows: int, loss: Tensor | None) -> Any:
    """Give a model's output an axis for the adapters in front.

    Args:
        output: What the model gave for all rows.
        adapters: How many there are.
        rows: How many rows each of them has.
        loss: The part of it that is its loss, if it says so.

    Returns:
        The same with tensors of shape (adapters, rows, ...); (adapters,) for what is one number for
        each adapter already, such as a loss. A cache of keys and values is left out.

    Raises:
        FoldError: If a part is neither a tensor with rows nor a plain value.
    """

    def unfolded(value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return value
        if not isinstance(value, Tensor):
            raise FoldError(
                f"the model gives a {type(value).__name__}, of which the parts are unknown; "
                "register it with torch.utils._pytree.register_pytree_node"
            )
        numbers = rows != 1 or value is loss or is_split(value)
        if value.shape == (adapters,) and numbers:
            return value
        if not value.ndim or value.shape[0] % max(adapters * rows, 1):
            raise FoldError(
                f"the model gives a tensor of shape {tuple(value.shape)} over the rows of "
                f"{adapters} adapters, which cannot be told apart; if it is a loss, pass loss_fn, "
                "and leave the labels out of what the model sees"
            )
        return value.reshape(adapters, value.shape[0] // adapters, *value.shape[1:])

    return tree_map(unfolded, without_caches(output))


def without_caches(output: Any) -> Any:
    """Leave transformers' caches of keys and values out."""

    def is_cache(value: Any) -> bool:
        return type(value).__module__.startswith("transformers.cache_utils")

    return tree_map(lambda value: None if is_cache(value) else value, output)


def of_adapter(output: Any, k: int | slice) -> Any:
    """Return the part of one adapter, or of several, of what has them on the first axis."""
    return tree_map_only(Tensor, lambda value: value[k], output)


_PLAIN = (type(None), bool, int, float, str)
