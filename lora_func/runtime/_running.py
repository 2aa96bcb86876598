"""One adapter at a time for each model: everyone who runs the modules sees the injected adapter."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from lora_func.errors import BusyModelError
from lora_func.modules import attached_path, identities
from lora_func.runtime._checks import check_unattached
from lora_func.runtime._patches import Patch
from lora_func.weights import is_quantised_state


class Repeatable(Protocol):
    """An injection that can be repeated for a part of its call."""

    @property
    def tensors(self) -> list[Tensor]:
        """The adapter's tensors."""

    def below(self, module: nn.Module | None) -> "Repeatable":
        """Return the part that goes into one module of the model; None means all of it."""

    def repeat(
        self,
        tensors: Sequence[Tensor] | None,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Call a function while the adapter is injected, with other tensors if they are given."""


class ActiveCall(NamedTuple):
    """A call that has an adapter injected.

    Attributes:
        sites: The ids of the modules that run another forward.
        modules: The ids of all modules of the model.
        origin: The call; a repeated part of a call has the origin of that call.
        injection: The injection, if it can be repeated.
        thread: The thread that runs it.
    """

    sites: frozenset[int]
    modules: frozenset[int]
    origin: object
    injection: Repeatable | None = None
    thread: int = 0

    def disturbs(self, other: "ActiveCall") -> bool:
        """True if one of the two calls would see what the other injected."""
        if self.origin is other.origin:
            return False
        return not (self.sites.isdisjoint(other.modules) and other.sites.isdisjoint(self.modules))


active: dict[object, ActiveCall] = {}
"""The active calls of this process by their tokens, in the order in which they began."""


def calls_here() -> list[ActiveCall]:
    """Return the active calls of this thread that can be repeated, in the order of their begin."""
    here = threading.get_ident()
    return [call for call in [*active.values()] if call.injection and call.thread == here]


def is_active(origin: object) -> bool:
    """True if the injection of an origin is in its model now."""
    calls = [*active.values()]
    return any(call.origin is origin and call.injection is not None for call in calls)


def check_first(token: object) -> None:
    """Check that no call that began earlier uses the same modules.

    Args:
        token: Token of an entry in ``active``.

    Raises:
        BusyModelError: If an earlier call, of any thread, uses them.
    """
    for other, call in [*active.items()]:
        if other is token:
            return
        if call.disturbs(active[token]):
            raise BusyModelError(
                "this model is running with an adapter, in another thread or around this call, and "
                "it holds one at a time; use a copy of its modules over the same tensors, made "
                "beforehand: skeleton(model)"
            )


def eval_patches(model: nn.Module, origin: object) -> Iterator[Patch]:
    """Yield patches that reserve a model and put it into eval mode.

    Args:
        model: The model.
        origin: The call for which the model is reserved.

    Yields:
        Patches. A model that is running raises ``BusyModelError`` before its mode changes.
    """
    token, modules = object(), identities(model)
    yield active, token, ActiveCall(modules, modules, origin)
    check_first(token)
    yield from ((vars(module), "training", False) for module in model.modules())


def check_idle(model: nn.Module, advice: str) -> None:
    """Check that a model does not run with an adapter.

    Args:
        model: The model.
        advice: Why it may not, and what to do.

    Raises:
        BusyModelError: If it does.
    """
    itself = ActiveCall(frozenset(), identities(model), None)
    if any(call.disturbs(itself) for call in [*active.values()]):
        raise BusyModelError(f"{type(model).__name__}: is running with an adapter; {advice}")


def skeleton(model: nn.Module) -> nn.Module:
    """Copy a model's modules over the same tensors, so that each copy can hold its own adapter.

    Args:
        model: The model; not inside ``adapted`` or ``fcall``.

    Returns:
        A new module tree that shares parameters, buffers, tensor attributes and the state of
        quantised weights.

    Raises:
        BusyModelError: If the model is running with an adapter, or has one attached.

    Examples:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> lf.skeleton(model)[0].weight is model[0].weight
        True
    """
    check_idle(model, "a copy would keep it; make the skeletons first")
    check_unattached(model, attached_path(model))
    attributes = [value for module in model.modules() for value in vars(module).values()]
    held = [v for v in attributes if isinstance(v, Tensor) or is_quantised_state(v)]
    shared: dict[int, Any] = {
        id(value): value for value in (*held, *model.parameters(), *model.buffers())
    }
    return copy.deepcopy(model, shared)
