"""The part that the configs of all variants share."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Self, TypeAlias

from lora_func.checks import as_tuple

Calibration: TypeAlias = Literal["inputs", "gradients", "pairs"]


class FrozenDict(dict[str, Any]):
    """A hashable dict that cannot be changed: the form in which a config keeps its patterns."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("a config cannot be changed; make another one with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def _documented_fields(config: type) -> str:
    """The section "Attributes:" of a config class, without its title."""
    text = inspect.cleandoc(config.__dict__.get("__doc__") or "")
    found = re.search(r"^Attributes:\n((?:^ .*\n?|^\n)+)", text, re.MULTILINE)
    return found[1].rstrip() if found else ""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The part of a config that says which layers of the model take part.

    Attributes:
        layers: Indices of the layers to adapt, counted within each stack of layers (an encoder and
            a decoder are two stacks). Negative indices count from the end. None means all layers,
            and also modules outside any stack.
    """

    layers: int | Sequence[int] | None = None

    def __init_subclass__(cls) -> None:
        """Append the inherited fields to the docstring, so that ``help`` shows all of them."""
        inherited = [base for base in cls.__mro__[1:] if issubclass(base, AdapterConfig)]
        own = inspect.cleandoc(cls.__dict__.get("__doc__") or f"Config {cls.__name__}.")
        for base in inherited:
            fields = _documented_fields(base)
            if fields:
                own += f"\n\nAttributes of {base.__name__}:\n{fields}"
        cls.__doc__ = own

    def __post_init__(self) -> None:
        if self.layers is not None:
            if not isinstance(self.layers, (int, Sequence)):
                raise TypeError(f"layers: got {self.layers!r}, expected an int or several")
            for layer in as_tuple(self.layers):
                if isinstance(layer, bool) or not isinstance(layer, int):
                    raise TypeError(f"layers: got {layer!r}, expected an int or several")
            if not as_tuple(self.layers):
                raise ValueError("layers: got an empty sequence; leave it None to adapt all layers")
        for name, value in vars(self).items():
            object.__setattr__(self, name, _frozen(value))

    @property
    def variant(self) -> str | None:
        """Name of the variant, where several variants share this config class; else None."""
        return None

    @property
    def calibration(self) -> Calibration | None:
        """What ``init`` measures on data for this config; None if it needs no data.

        "inputs": the inputs of each site. "gradients": the gradients of its outputs as well.
        "pairs": its inputs at the last token, in pairs of a positive and a negative batch.
        """
        return None

    def at(self, site: str) -> Self:
        """Return the config for one site, with the patterns over sites resolved."""
        return self

    def site_patterns(self) -> dict[str, tuple[str, ...]]:
        """Return the patterns that must each match a selected site, by the name of their field."""
        return {}


def _frozen(value: Any) -> Any:
    """An immutable copy of a field's value."""
    if isinstance(value, Mapping):
        return FrozenDict({key: _frozen(one) for key, one in value.items()})
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(map(_frozen, value))
    return value
