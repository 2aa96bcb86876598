"""Trees of tensors: batches, outputs, and arguments."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lora_func.compat import tree_flatten, tree_leaves, tree_map, tree_unflatten


class PerAdapter(list[Any]):
    """The values of several adapters that no tensor can hold, such as caches: a leaf of a tree."""


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in a tree."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def stacked(trees: Sequence[Any]) -> Any:
    """Stack the tensors of trees of one structure, one tree for each adapter.

    Args:
        trees: The trees.

    Returns:
        The tree with stacked tensors. Another value stays if it is plain and the same for all;
        else there is a list of all.

    Raises:
        ValueError: If tensors have different shapes.
    """

    def of_leaf(*values: Any) -> Any:
        if not isinstance(values[0], Tensor):
            return _common(values)
        shapes = [tuple(value.shape) for value in values]
        if len({*shapes}) > 1:
            raise ValueError(
                f"the adapters give results of the shapes {shapes}, which cannot be stacked; give "
                "results of one shape, or call fcall for each"
            )
        return torch.stack(values)

    return tree_map(of_leaf, *trees)


def _common(values: Sequence[Any]) -> Any:
    first = values[0]
    plain = all(type(value) is type(first) and value == first for value in values)
    return first if isinstance(first, PLAIN) and plain else PerAdapter(values)


PLAIN = (type(None), bool, int, float, str)
"""The types of values that several adapters may have in common."""


def unstacked(tree: Any, size: int) -> list[Any]:
    """Undo ``stacked``; indexing would make a gradient of the full size for each tree."""
    leaves, layout = tree_flatten(tree)
    parts = [_of_each(leaf, size) for leaf in leaves]
    return [tree_unflatten([part[k] for part in parts], layout) for k in range(size)]


def _of_each(leaf: Any, size: int) -> Sequence[Any]:
    if isinstance(leaf, PerAdapter):
        return leaf
    return leaf.unbind() if isinstance(leaf, Tensor) else [leaf] * size


def joined(trees: Sequence[Any], sizes: Sequence[int] | None = None) -> Any:
    """Concatenate the tensors of trees of one structure along their first axis.

    Args:
        trees: The trees.
        sizes: The number of adapters in each, so that lists of other values are joined too; None if
            other values are those of the first.

    Returns:
        One tree.
    """

    def of_leaf(*values: Any) -> Any:
        if isinstance(values[0], Tensor):
            return torch.cat(values)
        if sizes is None:
            return values[0]
        each = [
            value if isinstance(value, PerAdapter) else [value] * size
            for value, size in zip(values, sizes, strict=True)
        ]
        return _common([*chain(*each)])

    return trees[0] if len(trees) == 1 else tree_map(of_leaf, *trees)
