"""Writing into the dicts of live objects for a while, and restoring all of it, whatever happens."""

import threading
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeAlias, TypeVar

_ABSENT = object()

Value = TypeVar("Value")


Patch: TypeAlias = tuple[Any, Any, Any]
"""A place, a key in it, and the value to write there for a while.

The place is a dict, or an object with ``get``, ``pop`` and item assignment.
"""


class patched:  # noqa: N801 - a context manager, used like a function
    """Apply patches, and restore what was there: once and completely, also after an interrupt."""

    def __init__(self, patches: Iterable[Patch]) -> None:
        self._patches = patches
        self._found: list[Patch] = []

    def __enter__(self) -> None:
        try:
            for place, name, value in self._patches:
                self._found.append((place, name, place.get(name, _ABSENT)))
                place[name] = value
        except BaseException:
            self._restore()
            raise

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def __del__(self) -> None:
        # an interrupt may arrive before the block, on the way into __exit__, or in __init__
        if getattr(self, "_found", None):
            self._restore()

    def _restore(self) -> None:
        interrupt: BaseException | None = None
        found = self._found
        while found:
            try:
                place, name, value = found[-1]
                if value is _ABSENT:
                    place.pop(name, None)
                else:
                    place[name] = value
                del found[-1]
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt


class RefCountedSetting(Generic[Value]):
    """A setting of the whole process that holds while some call needs it; calls may overlap.

    It is the place of a patch: writing a token acquires it, and removing the token releases it. So
    the interrupt-safe ``patched`` holds settings too. Both steps may be repeated.
    """

    def __init__(
        self, read: Callable[[], Value], write: Callable[[Value], object], value: Value
    ) -> None:
        self._read, self._write, self._value = read, write, value
        self._lock = threading.RLock()
        self._holders: set[object] = set()
        self._before: list[Value] = []

    def get(self, token: object, default: Any) -> Any:
        """Return True if the token holds the setting, else the default."""
        return True if token in self._holders else default

    def __setitem__(self, token: object, held: bool) -> None:
        with self._lock:
            if not self._before:
                self._before.append(self._read())
            self._holders.add(token)
            self._write(self._value)

    def pop(self, token: object, default: Any) -> Any:
        """Release the setting; after the last release its former value returns."""
        with self._lock:
            self._holders.discard(token)
            if not self._holders and self._before:
                self._write(self._before[0])
                self._before.clear()
        return default
