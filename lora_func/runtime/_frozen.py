"""What a module has without an adapter, while it runs with one."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeAlias

from torch import Tensor, nn

from lora_func.errors import UnusedLeafError
from lora_func.modules import forward_slot
from lora_func.runtime._patches import Slot
from lora_func.weights._bitsandbytes import is_quantised
from lora_func.weights._layers import affine, linear

Forward: TypeAlias = Callable[..., Any]


class Watched(dict[str, Tensor]):
    """A dict that strikes what is read from it off a list.

    Attributes:
        frozen: The dict whose place it takes, if it takes one's.
    """

    __slots__ = ("_keys", "_unused", "frozen")

    def __init__(
        self,
        values: Mapping[str, Tensor],
        keys: Mapping[str, Collection[str]],
        unused: set[str],
        frozen: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(values)
        self._keys = keys
        self._unused = unused
        self.frozen = frozen

    def __getitem__(self, name: str) -> Tensor:
        self._unused.difference_update(self._keys.get(name, ()))
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._unused.difference_update(self._keys.get(name, ()))
        return super().get(name, default)

    def over(self, values: Mapping[str, Tensor]) -> "Watched":
        """Return a dict of other values that strikes the same off."""
        return Watched(values, self._keys, self._unused)

    def __reduce__(self) -> tuple[type[dict[str, Tensor]], tuple[dict[str, Tensor]]]:
        return dict, (dict(self),)


def refuse_unused(unused: Iterable[set[str] | None]) -> None:
    """Refuse leaves that had no part in a call.

    Args:
        unused: The keys of each adapter that nothing has read.

    Raises:
        UnusedLeafError: If there is any.
    """
    keys = set().union(*filter(None, unused))
    if keys:
        raise UnusedLeafError(
            f"{len(keys)} leaves had no part in this call, such as {min(keys)!r}: the model skips "
            "the layer, or reads its weight past it, or the variant has no such leaf; leave them "
            "out of the adapter, or name the weight with target_parameters, or pass strict=False"
        )


@dataclass(slots=True, eq=False, repr=False)
class OtherForward:
    """What a module runs in the place of its own forward: what it runs without an adapter.

    Attributes:
        frozen: What stood in that place.
        base: What the module runs without an adapter: the same, but for a quantised layer.
    """

    frozen: Forward
    base: Forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)

    def __deepcopy__(self, memo: object) -> Self:
        return self


def other_forward(
    module: nn.Module, path: str, kind: Callable[..., OtherForward], *settings: Any
) -> Slot:
    """Say what to write where so that a module runs another forward.

    Args:
        module: The module.
        path: Its path, for messages.
        kind: What it runs, made from what stood there, from what the module runs without an
            adapter, and from the settings.
        *settings: The settings.

    Returns:
        The slot.

    Raises:
        TypeError: If the user's own function stands there.
    """
    own, slot = vars(module), forward_slot(module)
    found = own.get(slot)
    if found is None:
        found = module.forward
    elif isinstance(found, OtherForward):
        found = found.frozen
    elif slot == "forward":
        raise TypeError(
            f"{path}: its forward was replaced on the instance, by {found!r}, which would be "
            "bypassed; remove that, or leave an adapted site out of the adapter"
        )
    base = partial(_run_quantised, path, module) if is_quantised(module) else found
    return own, slot, kind(found, base, *settings)


def _run_quantised(path: str, module: nn.Module, x: Tensor) -> Tensor:
    return linear(x, affine(module, path))


def frozen_parameters(module: nn.Module) -> Mapping[str, Tensor]:
    """Return a module's parameters as they are without an adapter."""
    own: Any = module._parameters
    frozen: Mapping[str, Tensor] | None = getattr(own, "frozen", None)
    return own if frozen is None else frozen


def shared_parameters(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return the places, module and name, of each parameter of a model, by its id."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in frozen_parameters(module).items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return places
