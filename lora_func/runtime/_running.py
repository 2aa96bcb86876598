"""One adapter at a time for each model: whoever runs the modules sees what was put into them."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from lora_func.errors import BusyModelError
from lora_func.modules import identities
from lora_func.runtime._patches import Slot
from lora_func.weights._bitsandbytes import is_state


class Work(Protocol):
    """What is put into a model for a call, and can be put there again to repeat a part of it."""

    @property
    def rows(self) -> Any:
        """Whose rows are whose, if several adapters share the call; else None."""

    @property
    def tensors(self) -> list[Tensor]:
        """The adapter's tensors."""

    def below(self, module: nn.Module | None) -> "Work":
        """Return the part of the work that goes into one module of the model; None is all."""

    def redo(
        self,
        tensors: Sequence[Tensor] | None,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Call a function while the work is in the model, with other tensors if there are some."""


class Run(NamedTuple):
    """An adapter at work.

    Attributes:
        sites: The ids of the modules that run another forward.
        modules: The ids of all modules of the model.
        origin: Who runs; a repeated part of a call has the origin of the call.
        work: What was put into the model, if it can be put there again.
        thread: The thread in which it runs.
    """

    sites: frozenset[int]
    modules: frozenset[int]
    origin: object
    work: Work | None = None
    thread: int = 0

    def disturbs(self, other: "Run") -> bool:
        """Tell whether either would see what the other put into the modules."""
        if self.origin is other.origin:
            return False
        return not (self.sites.isdisjoint(other.modules) and other.sites.isdisjoint(self.modules))


running: dict[object, Run] = {}
"""The adapters at work in this process, in the order in which they began; by a token each."""


def runs_here() -> list[Run]:
    """Return the runs of this thread that can be repeated, in the order in which they began."""
    here = threading.get_ident()
    return [run for run in [*running.values()] if run.work is not None and run.thread == here]


def is_running(origin: object) -> bool:
    """Tell whether what an origin put into its model is there now."""
    return any(run.origin is origin for run in [*running.values()])


def refuse_others(mine: object) -> None:
    """Give way to whoever began before.

    Args:
        mine: Token of an entry in ``running``.

    Raises:
        BusyModelError: If an earlier adapter is at work in the same modules, in whatever thread.
    """
    for token, run in [*running.items()]:
        if token is mine:
            return
        if run.disturbs(running[mine]):
            raise BusyModelError(
                "this model is running with an adapter, in another thread or around this call, and "
                "it holds one at a time; use a copy of its modules over the same tensors, made "
                "beforehand: skeleton(model)"
            )


def quiet_slots(model: nn.Module, origin: object) -> Iterator[Slot]:
    """Say what to write where to take a model for oneself, and to put it into eval mode.

    Args:
        model: The model.
        origin: Whose runs it may still be used by.

    Yields:
        Slots. Whoever runs the model gets a ``BusyModelError`` before its mode is changed.
    """
    token, modules = object(), identities(model)
    yield running, token, Run(modules, modules, origin)
    refuse_others(token)
    yield from ((vars(module), "training", False) for module in model.modules())


def refuse_running(model: nn.Module, reason: str) -> None:
    """Refuse a model that is running with an adapter.

    Args:
        model: The model.
        reason: Why, and what to do.

    Raises:
        BusyModelError: If it is.
    """
    itself = Run(frozenset(), identities(model), None)
    if any(run.disturbs(itself) for run in [*running.values()]):
        raise BusyModelError(f"{type(model).__name__}: is running with an adapter; {reason}")


def skeleton(model: nn.Module) -> nn.Module:
    """Copy a model's modules over the same tensors, so that each copy can hold an adapter.

    Args:
        model: The model; not inside ``adapted`` or ``fcall``.

    Returns:
        A module tree of its own that shares parameters, buffers, tensor attributes and what belongs
        to quantised weights.

    Raises:
        BusyModelError: If the model is running with an adapter.

    Example:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> lf.skeleton(model)[0].weight is model[0].weight
        True
    """
    refuse_running(model, "a copy would keep it; make the skeletons first")
    attributes = [value for module in model.modules() for value in vars(module).values()]
    held = [value for value in attributes if isinstance(value, Tensor) or is_state(value)]
    shared: dict[int, Any] = {
        id(value): value for value in (*held, *model.parameters(), *model.buffers())
    }
    return copy.deepcopy(model, shared)
