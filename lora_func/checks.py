"""Checks of what the user gave: each names the field, the value found and the values accepted."""

import math
import re
from collections.abc import Sequence
from typing import Any, overload


@overload
def as_tuple(one_or_more: str | Sequence[str]) -> tuple[str, ...]: ...
@overload
def as_tuple(one_or_more: int | Sequence[int]) -> tuple[int, ...]: ...
def as_tuple(one_or_more: Any) -> tuple[Any, ...]:
    """Return a single value, or a sequence of values, as a tuple."""
    return (one_or_more,) if isinstance(one_or_more, (str, int)) else tuple(one_or_more)


def check_patterns(field_name: str, patterns: str | Sequence[str]) -> None:
    """Check a regular expression, or a sequence of regular expressions.

    Raises:
        TypeError: If a pattern is not a string.
        ValueError: If a pattern is not a valid regular expression.
    """
    if not isinstance(patterns, Sequence):
        raise TypeError(f"{field_name}: got {patterns!r}, expected a regular expression or several")
    for pattern in as_tuple(patterns):
        if not isinstance(pattern, str):
            raise TypeError(f"{field_name}: got {pattern!r}, expected a regular expression")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{field_name}: {pattern!r} is no regular expression: {error}"
            ) from None


def check_count(field_name: str, value: Any, least: int = 1) -> None:
    """Check an integer against its smallest allowed value.

    Raises:
        ValueError: If the value is not an integer, or is smaller.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{field_name}: got {value!r}, expected an integer of at least {least}")


def check_number(field_name: str, value: Any, above: float | None = None) -> None:
    """Check a finite number, optionally against a lower bound.

    Raises:
        ValueError: If the value is not a finite number, or is not above the bound.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and (above is None or value > above)):
        bound = "" if above is None else f" above {above}"
        raise ValueError(f"{field_name}: got {value!r}, expected a finite number{bound}")


def check_choice(field_name: str, value: Any, choices: Sequence[Any]) -> None:
    """Check that a value is one of the choices.

    Raises:
        ValueError: If it is not.
    """
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(
            f"{field_name}: got {value!r}, expected one of {', '.join(map(repr, choices))}"
        )


def check_flag(field_name: str, value: Any) -> None:
    """Check that a value is True or False.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{field_name}: got {value!r}, expected True or False")
