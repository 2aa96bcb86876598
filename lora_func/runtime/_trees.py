"""Trees of tensors: batches, outputs, and arguments."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_func.compat import tree_flatten, tree_leaves, tree_map, tree_unflatten


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in a tree."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def stacked(trees: Sequence[Any]) -> Any:
    """Stack the tensors of trees of one structure; other values come from the first tree."""
    return _over_tensors(torch.stack, trees)


def unstacked(tree: Any, size: int) -> list[Any]:
    """Undo ``stacked``; indexing would make a gradient of the full size for each tree."""
    leaves, layout = tree_flatten(tree)
    parts = [leaf.unbind() if isinstance(leaf, Tensor) else [leaf] * size for leaf in leaves]
    return [tree_unflatten([part[k] for part in parts], layout) for k in range(size)]


def joined(trees: Sequence[Any]) -> Any:
    """Concatenate the tensors of trees of one structure along their first axis."""
    return trees[0] if len(trees) == 1 else _over_tensors(torch.cat, trees)


def _over_tensors(join: Callable[..., Tensor], trees: Sequence[Any]) -> Any:
    def of_leaf(*values: Any) -> Any:
        return join(values) if isinstance(values[0], Tensor) else values[0]

    return tree_map(of_leaf, *trees)
