"""Transformers' caches of keys and values in a sweep: each adapter gets a cache of its own."""

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

from torch import Tensor

from lora_func.compat import is_cache, tree_map
from lora_func.errors import FoldError
from lora_func.runtime import arguments


def check_no_cache(batch: Any) -> None:
    """Check that a batch holds no cache: a call writes into it, for all adapters at once.

    Raises:
        ValueError: If it holds one.
    """
    args, kwargs = arguments(batch)
    for value in (*args, *kwargs.values()):
        if is_cache(value):
            raise ValueError(
                f"batch: holds a {type(value).__name__}, which each adapter would change; leave it "
                "out, and go on from the caches in the result with `with adapted(model, params)`"
            )


def part_of_cache(cache: Any, k: int, adapters: int, rows: int) -> Any:
    """Return the part of one adapter of a cache over the rows of all adapters.

    Args:
        cache: The cache.
        k: The index of the adapter.
        adapters: The number of adapters.
        rows: The number of rows of each adapter.

    Returns:
        A cache over views of the same tensors.

    Raises:
        FoldError: If a tensor in it has rows on another axis than the first.
    """

    def part(tensor: Tensor) -> Tensor:
        if tensor.ndim < 2:
            return tensor
        if tensor.shape[0] != adapters * rows:
            raise FoldError(
                f"the model gives a {type(cache).__name__} with a tensor of shape "
                f"{tuple(tensor.shape)}, which cannot be separated into {adapters} adapters of "
                f"{rows} rows; pass use_cache=False"
            )
        return tensor[k * rows : (k + 1) * rows]

    return _mapped(cache, part)


def opened(tree: Any) -> Any:
    """Return a tree with lists of tensors in the place of caches, so that it can be compared."""

    def tensors(value: Any) -> Any:
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        if not is_cache(value):
            return value
        _mapped(value, note)
        return found

    return tree_map(tensors, tree)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a cache with other tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(one, function) for one in value)
    if isinstance(value, Mapping):
        return type(value)({key: _mapped(one, function) for key, one in value.items()})  # type: ignore[call-arg]
    if not is_cache(value):
        return value
    mapped = copy(value)
    vars(mapped).update({name: _mapped(one, function) for name, one in vars(value).items()})
    return mapped
