"""One adapter at a time for each model: whoever runs the modules sees what was put into them."""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lora_func._errors import BusyModelError
from lora_func._modules import identities, structure

_running: list[tuple[frozenset[int]]] = []
_lock = threading.Lock()


@contextmanager
def exclusively(modules: frozenset[int]) -> Iterator[None]:
    """Hold a model's modules for one adapter.

    Args:
        modules: Their ids.

    Raises:
        BusyModelError: If any of them is held, by whatever thread.
    """
    mine = (modules,)
    try:
        with _lock:
            if _is_running(modules):
                raise BusyModelError(
                    "this model is running with an adapter, in another thread or around this call, "
                    "and it holds one at a time; use a copy of its modules over the same tensors, "
                    "made beforehand: skeleton(model)"
                )
            _running.append(mine)
        yield
    finally:
        with _lock:
            _running[:] = [other for other in _running if other is not mine]


def skeleton(model: nn.Module) -> nn.Module:
    """Copy a model's modules over the same tensors, so that each copy can hold an adapter.

    Args:
        model: The model; not inside ``adapted`` or ``fcall``.

    Returns:
        A module tree of its own that shares parameters, buffers and tensor attributes.

    Raises:
        BusyModelError: If the model is running with an adapter.

    Example:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> lf.skeleton(model)[0].weight is model[0].weight
        True
    """
    with _lock:
        if _is_running(identities(structure(model))):
            raise BusyModelError(
                f"skeleton({type(model).__name__}): the model is running with an adapter, which "
                "the copy would keep; make the skeletons first"
            )
        attributes = [value for module in model.modules() for value in vars(module).values()]
        tensors = [value for value in attributes if isinstance(value, Tensor)]
        shared: dict[int, Any] = {
            id(tensor): tensor for tensor in (*tensors, *model.parameters(), *model.buffers())
        }
        return copy.deepcopy(model, shared)


def _is_running(modules: frozenset[int]) -> bool:
    return any(not theirs.isdisjoint(modules) for (theirs,) in _running)
