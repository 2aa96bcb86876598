"""One thread at a time for each model: an injection is seen by whoever runs the modules."""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_func._errors import ConcurrentCallError
from lora_func._plan import identities

_running: list[tuple[int, frozenset[int]]] = []
_running_lock = threading.Lock()


@contextmanager
def owned(modules: frozenset[int]) -> Iterator[None]:
    """Hold a model for this thread, which may hold it already.

    Args:
        modules: The ids of the model's modules.

    Raises:
        ConcurrentCallError: If another thread holds any of them.
    """
    mine = threading.get_ident(), modules
    try:
        with _running_lock:
            for thread, theirs in _running:
                if thread != mine[0] and not theirs.isdisjoint(modules):
                    raise ConcurrentCallError(
                        "another thread is running this model with an adapter, and a model holds "
                        "one at a time; give each thread a copy that shares all tensors: "
                        "skeleton(model)"
                    )
            _running.append(mine)
        yield
    finally:
        with _running_lock:
            if mine in _running:
                _running.remove(mine)


def skeleton(model: nn.Module) -> nn.Module:
    """Copy a model's modules and share all its tensors, for another thread to adapt.

    Args:
        model: The model; not inside ``adapted`` or ``fcall``.

    Returns:
        A module tree of its own over the very same parameters and buffers; it costs no tensor
        memory.

    Raises:
        ConcurrentCallError: If the model is running with an adapter.

    Example:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> lf.skeleton(model)[0].weight is model[0].weight
        True
    """
    with _running_lock:
        if any(not theirs.isdisjoint(identities(model)) for _, theirs in _running):
            raise ConcurrentCallError(
                f"skeleton({type(model).__name__}): the model is running with an adapter, which "
                "the copy would keep; make the skeletons first"
            )
        shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        return copy.deepcopy(model, shared)
