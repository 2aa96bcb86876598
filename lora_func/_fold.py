"""The adapter axis folded into the rows of a batch, and unfolded from what a model gives."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
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
    if batched and any(len(shape) < 2 or shape[0] != adapters for shape in shapes):
        raise FoldError(
            f"batch: tensors of shapes {shapes}; with batched=True each has the axes (adapters, "
            f"rows, ...), here ({adapters}, rows, ...)"
        )
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


_LOSSES: set[Callable[..., Tensor]] = {
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.cross_entropy,
    F.gaussian_nll_loss,
    F.huber_loss,
    F.kl_div,
    F.l1_loss,
    F.mse_loss,
    F.nll_loss,
    F.poisson_nll_loss,
    F.smooth_l1_loss,
}


class LossesApart(TorchFunctionMode):
    """While it is entered, a loss over the rows of all adapters comes as one for each of them.

    So the model's own code computes the losses, with its own shifts, weights and ignored labels.
    """

    def __init__(self, adapters: int) -> None:
        super().__init__()
        self.adapters = adapters

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _LOSSES or kwargs.get("reduction") == "none":
            return func(*args, **kwargs)
        rows = args[0].shape[0] if args[0].ndim else 0
        if rows % self.adapters or any(x.shape[:1] != (rows,) for x in args):
            return func(*args, **kwargs)
        pieces = zip(*(x.unflatten(0, (self.adapters, -1)) for x in args), strict=True)
        return torch.stack([func(*piece, **kwargs) for piece in pieces])
