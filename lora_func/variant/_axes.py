"""The grammar in which a variant names the axes of its leaves, and the check of shapes against it.

A leaf's axes are words, separated by spaces: ``"d_out r"``. A word is a name or a size (``2``), or
a product or quotient of them: ``"a*b"``, ``"d_in/b"``. A name stands for one size in all leaves of
a site; ``d_out`` and ``d_in`` are the sizes of the weight, ``r`` is the rank. ``|`` separates
alternatives: ``"groups g | groups 2 g"``. A scalar has no axes: ``""``.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from typing import TypeAlias

Axes: TypeAlias = tuple[tuple[str, ...], ...]
"""The alternatives for one leaf, each a tuple of words."""

Shape: TypeAlias = tuple[int, ...]

_WORD = re.compile(r"(\w+)([*/]\w+)*", re.ASCII)


def parse_axes(text: str) -> Axes:
    """Parse the axes of one leaf.

    Returns:
        Its alternatives.

    Raises:
        ValueError: If a word is malformed.
    """
    alternatives = tuple(tuple(part.split()) for part in text.split("|"))
    for word in (word for words in alternatives for word in words):
        if not _WORD.fullmatch(word):
            raise ValueError(
                f"axis {word!r}: expected a name, a size, or a product such as a*b or d_in/b"
            )
    return alternatives


def fit(
    axes: Mapping[str, Axes], shapes: Mapping[str, Shape], sizes: Mapping[str, int]
) -> dict[str, Shape]:
    """Fit the shapes of a site's leaves to their axes; the first alternatives that fit are taken.

    Args:
        axes: Leaf -> its alternatives.
        shapes: Leaf -> its shape, possibly with more axes in front, as in a stack.
        sizes: The sizes that are known: of d_out and d_in.

    Returns:
        Leaf -> the shape of the axes in front.

    Raises:
        ValueError: If nothing fits. The message begins with the name of a leaf.
    """
    error: ValueError | None = None
    for choice in product(*(axes[leaf] for leaf in shapes)):
        try:
            return _fit(dict(zip(shapes, choice, strict=True)), shapes, dict(sizes))
        except ValueError as failed:
            error = error or failed
    assert error is not None
    raise error


def _fit(
    chosen: Mapping[str, Sequence[str]], shapes: Mapping[str, Shape], sizes: dict[str, int]
) -> dict[str, Shape]:
    """Fit one choice of alternatives; fills in the sizes."""
    front: dict[str, Shape] = {}
    open_: list[tuple[str, str, int]] = []
    for leaf, words in chosen.items():
        split = len(shapes[leaf]) - len(words)
        if split < 0:
            raise _misfit(leaf, words, shapes[leaf], sizes)
        front[leaf] = shapes[leaf][:split]
        open_ += [(leaf, *pair) for pair in zip(words, shapes[leaf][split:], strict=True)]
    progress = True
    while progress:
        progress, waiting = False, open_
        open_ = []
        for leaf, word, size in waiting:
            solved = _solve(word, size, sizes)
            if solved is False:
                raise _misfit(leaf, chosen[leaf], shapes[leaf], sizes)
            if solved is None:
                open_.append((leaf, word, size))
            else:
                progress = True
    return front


def _solve(word: str, size: int, sizes: dict[str, int]) -> bool | None:
    """Whether a word can have a size; None as long as two of its names are unknown."""
    parts = re.split(r"(?=[*/])", word)
    above = [part.lstrip("*") for part in parts if not part.startswith("/")]
    below = [part.lstrip("/") for part in parts if part.startswith("/")]
    unknown = [name for name in (*above, *below) if not name.isdigit() and name not in sizes]
    if len(unknown) > 1:
        return None
    left = prod(_value(name, sizes) for name in above)
    right = size * prod(_value(name, sizes) for name in below)
    if not unknown:
        return left == right
    more, less = (right, left) if unknown[0] in above else (left, right)
    if not less or more % less:
        return not more and not less
    sizes[unknown[0]] = more // less
    return True


def _value(name: str, sizes: Mapping[str, int]) -> int:
    return int(name) if name.isdigit() else sizes.get(name, 1)


def _misfit(leaf: str, words: Sequence[str], shape: Shape, sizes: Mapping[str, int]) -> ValueError:
    expected = ", ".join(f"{word}={sizes[word]}" if word in sizes else word for word in words)
    return ValueError(f"{leaf}: got shape {shape}, expected ({expected})")
