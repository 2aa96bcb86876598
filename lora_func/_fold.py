"""The adapter axis folded into the rows of a batch, and unfolded from what a model gives."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lora_func._batch import LossFn, arguments
from lora_func._errors import FoldError


def batch_of(batch: Any, batched: bool, at: int | slice) -> Any:
    """Return the batch of one adapter, or of several.

    Args:
        batch: As for ``vcall``.
        batched: Whether each adapter has its own.
        at: Whose.
    """
    if not batched:
        return batch
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map(lambda value: value[at] if isinstance(value, Tensor) else value, batch)


def refuse_other_axes(batch: Any, adapters: int) -> None:
    """Refuse a batch that is none for each adapter.

    Args:
        batch: As for ``vcall`` with ``batched=True``.
        adapters: How many there are.

    Raises:
        ValueError: If a tensor has not the axes (adapters, rows, ...).
    """
    shapes = [tuple(v.shape) for v in tree_leaves(arguments(batch)) if isinstance(v, Tensor)]
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
    places = [i for i, v in enumerate(values) if isinstance(v, Tensor) and (v.ndim or batched)]
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
            if value.shape[1] != rows:
                value = value.expand(-1, rows, *value.shape[2:])
            values[i] = value.flatten(0, 1)
        elif value.shape[0] == rows:
            values[i] = value.expand(adapters, *value.shape).flatten(0, 1)
    args, kwargs = tree_unflatten(values, layout)
    return args, kwargs, rows


def unfold(output: Any, adapters: int) -> Any:
    """Give a model's output an axis for the adapters in front.

    Args:
        output: What the model gave for all rows; its ``loss`` is one for each adapter already.
        adapters: How many there are.

    Returns:
        The same with tensors of shape (adapters, rows, ...).

    Raises:
        FoldError: If a tensor has no rows, or the output is no tree of tensors.
    """
    loss = getattr(output, "loss", None)
    values = tree_leaves(output)
    if len(values) == 1 and values[0] is output and not isinstance(output, Tensor):
        raise FoldError(
            f"the model gives a {type(output).__name__}, of which the parts are unknown; register "
            "it with torch.utils._pytree.register_pytree_node"
        )

    def unfolded(value: Any) -> Any:
        if not isinstance(value, Tensor) or value is loss:
            return value
        if not value.ndim or value.shape[0] % adapters:
            raise FoldError(
                f"the model gives a tensor of shape {tuple(value.shape)}, which cannot be told "
                f"apart for {adapters} adapters"
            )
        return value.reshape(adapters, -1, *value.shape[1:])

    return tree_map(unfolded, output)


def refuse_mixed(output: Any, adapters: int) -> None:
    """Refuse losses over the rows of all adapters.

    Args:
        output: What the model gave for all rows.
        adapters: How many there are.

    Raises:
        FoldError: If it has one.
    """
    loss = getattr(output, "loss", None)
    if loss is not None and (not isinstance(loss, Tensor) or loss.shape != (adapters,)):
        raise FoldError(
            "the model's loss is one number over the rows of all adapters; pass loss_fn, and "
            "leave the labels out of what the model sees"
        )
    if getattr(output, "aux_loss", None) is not None:
        raise FoldError(
            "the model adds an auxiliary loss over the rows of all adapters; switch it off "
            "(output_router_logits=False)"
        )


def results(output: Any, batch: Any, adapters: int, batched: bool, loss_fn: LossFn | None) -> Any:
    """Return for each adapter what ``fcall`` would return for it, stacked.

    Args:
        output: What the model gave for all rows, not mixed.
        batch: As for ``vcall``.
        adapters: How many there are.
        batched: Whether each has a batch of its own.
        loss_fn: As for ``fcall``.
    """
    loss = getattr(output, "loss", None)
    if loss_fn is None and loss is not None:
        return loss
    output = unfold(output, adapters)
    if loss_fn is None:
        return output
    each = [loss_fn(of_adapter(output, k), batch_of(batch, batched, k)) for k in range(adapters)]
    return tree_map(lambda *values: torch.stack(values), *each)


def of_adapter(output: Any, k: int) -> Any:
    """Return one adapter's part of what is unfolded."""
    return tree_map(lambda value: value[k] if isinstance(value, Tensor) else value, output)


def joined(pieces: Sequence[Any]) -> Any:
    """Join what several groups of adapters gave."""
    return pieces[0] if len(pieces) == 1 else tree_map(lambda *ts: torch.cat(ts), *pieces)
