"""Hypothesis strategies that draw shapes and seeds; the numbers follow from the seed."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lora_func.testing._cases import Case, Subject
from lora_func.testing._layers import Layer, random_stack

dims: st.SearchStrategy[int] = st.integers(1, 9)
"""Widths of layers."""

seeds: st.SearchStrategy[int] = st.integers(0, 2**32)
"""Seeds of random numbers."""

floats: st.SearchStrategy[torch.dtype] = st.sampled_from(
    [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
"""The dtypes that layers and leaves may have."""


def batches(least: int = 0, most: int = 3) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw shapes of activations, without the last axis.

    Args:
        least: The least number of axes.
        most: The largest.

    Returns:
        The strategy.
    """
    return st.lists(st.integers(1, 4), min_size=least, max_size=most).map(tuple)


@st.composite
def layers(draw: st.DrawFn, /, case: Subject, **fixed: Any) -> Layer:
    """Draw a layer with an adapter: any shape, with or without bias, any shape of the batch.

    Args:
        draw: Given by hypothesis.
        case: The case.
        **fixed: Arguments of ``Case.layer`` that are not drawn.

    Returns:
        The layer.
    """
    d_in, d_out = draw(dims), draw(dims)
    drawn: dict[str, Any] = {
        "d_in": d_in,
        "d_out": d_out,
        "r": draw(st.integers(1, min(d_in, d_out))),
        "bias": draw(st.booleans()),
        "batch": draw(batches(*case.batch_axes)),
        "seed": draw(seeds),
    }
    return case.layer(**(drawn | fixed))


@st.composite
def dtypes(draw: st.DrawFn, /, case: Subject) -> tuple[torch.dtype, torch.dtype]:
    """Draw the dtypes of a layer and of its leaves.

    Args:
        draw: Given by hypothesis.
        case: The case.

    Returns:
        Any two, if the leaves adapt a weight. A copy of a parameter keeps what the parameter holds.
        A module of another package has leaves of its layer's dtype, or of at least float32.
    """
    dtype = draw(floats)
    if not isinstance(case, Case):
        return dtype, torch.promote_types(dtype, torch.float32)
    leaf_dtype = draw(floats)
    return dtype, leaf_dtype if case.is_adapter else torch.promote_types(dtype, leaf_dtype)


class Stacked:
    """Several adapters of one layer.

    Attributes:
        layer: The layer, with the first adapter.
        each: The leaves of each adapter.
        stack: The same leaves stacked.
    """

    def __init__(self, layer: Layer, adapters: int, seed: int) -> None:
        self.layer = layer
        self.each, self.stack = random_stack(layer, adapters, seed)

    def __repr__(self) -> str:
        return f"{len(self.each)} adapters of {self.layer!r}"

    def alone(self, x: Tensor | None = None) -> Tensor:
        """Run the layer with each adapter, one after another, each on its rows of x if given."""
        rows = [None] * len(self.each) if x is None else x.unbind()
        outputs = [self.layer.apply(one, own) for one, own in zip(self.each, rows, strict=True)]
        return torch.stack(outputs)


@st.composite
def stacks(draw: st.DrawFn, /, case: Subject, **fixed: Any) -> Stacked:
    """Draw 1 to 4 adapters of one layer with random trained leaves.

    Args:
        draw: Given by hypothesis.
        case: The case.
        **fixed: Arguments of ``Case.layer`` that are not drawn.

    Returns:
        The adapters, alone and stacked.
    """
    settings = {"r": 1, "scrambled": True} | fixed
    return Stacked(draw(layers(case, **settings)), draw(st.integers(1, 4)), draw(seeds))
