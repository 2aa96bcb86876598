"""Regular expressions over module paths; each must match something."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn


def kind(module: nn.Module) -> str:
    """Name a module's class with its package."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def first_match(patterns: Iterable[str], path: str) -> str | None:
    """Return the first pattern that is found in a path, or None."""
    return next((pattern for pattern in patterns if re.search(pattern, path)), None)


def check_matches(
    field: str, patterns: Iterable[str], paths: Iterable[str], others: Mapping[str, str]
) -> None:
    """Check that each pattern matches something.

    Args:
        field: The config's field, for the message.
        patterns: Regular expressions, searched.
        paths: Each pattern must match one of these.
        others: Paths that do not count: path -> why.

    Raises:
        ValueError: If a pattern matches none of the paths; the message names the most similar ones.
    """
    paths = [*paths]
    for pattern in patterns:
        if any(re.search(pattern, path) for path in paths):
            continue
        matched = some(
            f"{path} ({why})" for path, why in others.items() if re.search(pattern, path)
        )
        hint = f", but {matched}" if matched else ""
        nearest = some(_nearest(pattern, paths))
        raise ValueError(f"{field}: {pattern!r} matches no site{hint}; nearest are {nearest}")


def _nearest(pattern: str, paths: Sequence[str]) -> list[str]:
    """The three paths most similar to a pattern, one for each place that repeats over layers."""
    places = {re.sub(r"\d+", "*", path): path for path in reversed(paths)}
    words = re.sub(r"\\[A-Za-z]|[^A-Za-z0-9_.]", "", pattern).strip(".")

    def likeness(path: str) -> float:
        ends = (path, path.rpartition(".")[2])
        return max(difflib.SequenceMatcher(None, words, end).ratio() for end in ends)

    return sorted(places.values(), key=likeness, reverse=True)[:3]


def some(names: Iterable[str]) -> str:
    """List the first three names and count the rest."""
    names = [*names]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
