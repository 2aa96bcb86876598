"""Trees of tensors: batches, outputs, and arguments."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lora_func.compat import is_cache, tree_flatten, tree_leaves, tree_map, tree_unflatten


class PerAdapter(list[Any]):
    """The values of several adapters that no tensor can hold, such as caches: a leaf of a tree."""


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in a tree."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def stacked(trees: Sequence[Any]) -> Any:
    """Stack the tensors of trees of one structure; caches become a list, other values the first."""
    return _over_tensors(torch.stack, trees)


def unstacked(tree: Any, size: int) -> list[Any]:
    """Undo ``stacked``; indexing would make a gradient of the full size for each tree."""
    leaves, layout = tree_flatten(tree)
    parts = [_of_each(leaf, size) for leaf in leaves]
    return [tree_unflatten([part[k] for part in parts], layout) for k in range(size)]


def _of_each(leaf: Any, size: int) -> Sequence[Any]:
    if isinstance(leaf, PerAdapter):
        return leaf
    return leaf.unbind() if isinstance(leaf, Tensor) else [leaf] * size


def joined(trees: Sequence[Any]) -> Any:
    """Concatenate the tensors of trees of one structure along their first axis."""
    return trees[0] if len(trees) == 1 else _over_tensors(torch.cat, trees)


def _over_tensors(join: Callable[..., Tensor], trees: Sequence[Any]) -> Any:
    def of_leaf(*values: Any) -> Any:
        if isinstance(values[0], Tensor):
            return join(values)
        if isinstance(values[0], PerAdapter):
            return PerAdapter(chain(*values))
        return PerAdapter(values) if is_cache(values[0]) else values[0]

    return tree_map(of_leaf, *trees)
