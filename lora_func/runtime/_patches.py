"""Writing into the dicts of live modules for a while, and never leaving anything behind."""

from collections.abc import Iterable
from typing import Any, TypeAlias

_ABSENT = object()

Slot: TypeAlias = tuple[dict[Any, Any], Any, Any]
"""A dict, a key in it, and the value to put there."""


class Put:
    """Write into dicts, and restore what they held: once, and completely, also when interrupted."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._slots = slots
        self._found: list[Slot] = []

    def __enter__(self) -> None:
        try:
            for place, name, value in self._slots:
                self._found.append((place, name, place.get(name, _ABSENT)))
                place[name] = value
        except BaseException:
            self._restore()
            raise

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def __del__(self) -> None:
        # an interrupt may come on the way into the block or into __exit__, or even into __init__
        if hasattr(self, "_found"):
            self._restore()

    def _restore(self) -> None:
        interrupt: BaseException | None = None
        while self._found:
            try:
                place, name, value = self._found[-1]
                if value is _ABSENT:
                    place.pop(name, None)
                else:
                    place[name] = value
                del self._found[-1]
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt
