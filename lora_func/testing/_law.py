"""Laws: properties of adapter methods that hypothesis checks on drawn examples."""

import re
from collections.abc import Callable
from functools import update_wrapper
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st

from lora_func.testing._cases import Case, Subject

T = TypeVar("T")


class Draw(Protocol):
    """Draws an example from a strategy."""

    def __call__(self, strategy: st.SearchStrategy[T], /) -> T:
        """Return the example."""


Check: TypeAlias = Callable[[Any, Draw], None]


class Counterexample(NamedTuple):
    """An example on which a law is broken.

    Attributes:
        drawn: The smallest one that was found: sizes and seed.
        error: What was raised there.
    """

    drawn: str
    error: str


class Law:
    """A property of adapter methods: call it with a ``Case`` to check it.

    Attributes:
        name: The name of its function.
        statement: The property, as mathematics.
        hint: What a method does wrong that breaks it, as a rule.
        foreign: True if it applies to modules of other packages too.
    """

    def __init__(
        self, check: Check, hint: str, applies: Callable[[Any], object], foreign: bool
    ) -> None:
        self._check, self._applies = check, applies
        self.hint, self.foreign = hint, foreign
        self.name = check.__name__
        update_wrapper(self, check)
        del vars(self)["__wrapped__"]  # its signature is not that of a law
        self.statement = " ".join((check.__doc__ or "").split())

    def __repr__(self) -> str:
        return self.name

    def __call__(self, case: Subject) -> None:
        """Check the law on drawn examples.

        Args:
            case: The case.

        Raises:
            AssertionError: If it is broken; other errors of the method are raised as they are.
        """
        self._run(case, [], deadline=None, suppress_health_check=[HealthCheck.too_slow])

    def applies(self, case: Subject) -> bool:
        """True if the law says something about a case."""
        return (self.foreign or isinstance(case, Case)) and bool(self._applies(case))

    def counterexample(self, case: Subject, examples: int) -> Counterexample | None:
        """Look for an example on which the law is broken.

        Args:
            case: The case.
            examples: How many to draw.

        Returns:
            The smallest one; None if the law held.
        """
        drawn: list[object] = []
        try:
            self._run(
                case,
                drawn,
                max_examples=examples,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate, Phase.shrink],
                report_multiple_bugs=False,
                verbosity=Verbosity.quiet,
                suppress_health_check=[*HealthCheck],
            )
        except Exception as error:
            return Counterexample("; ".join(map(repr, drawn)), f"{type(error).__name__}: {error}")
        return None

    def _run(self, case: Subject, drawn: list[object], **options: Any) -> None:
        def check(data: st.DataObject) -> None:
            drawn.clear()

            def draw(strategy: st.SearchStrategy[T]) -> T:
                drawn.append(value := data.draw(strategy))
                return value

            self._check(case, draw)

        # the name by which hypothesis keeps what failed before
        check.__name__ = re.sub(r"\W", "_", f"{self.name}_{case}")
        settings(**options)(given(st.data())(check))()


def law(
    *, hint: str, applies: Callable[[Any], object] = lambda case: True, foreign: bool = False
) -> Callable[[Check], Law]:
    """Make a law of a function ``(case, draw)`` that raises AssertionError if it is broken.

    Args:
        hint: As in ``Law``.
        applies: Tells whether the law says something about a case.
        foreign: As in ``Law``.

    Returns:
        A decorator.
    """
    return lambda check: Law(check, hint, applies, foreign)
