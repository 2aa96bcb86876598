"""Hypothesis strategies that draw shapes and seeds; tensor elements follow from the seed."""

from hypothesis import strategies as st

from tests.support.cases import CASES, Case, Layer, make_layer

dims = st.integers(1, 9)
seeds = st.integers(0, 2**32)
batches = st.lists(st.integers(1, 4), max_size=3).map(tuple)


@st.composite
def layers(draw: st.DrawFn, case: Case, **fixed: object) -> Layer:
    """A layer of any shape, with or without bias, for any batch shape."""
    d_in, d_out = draw(dims), draw(dims)
    drawn = {
        "d_in": d_in,
        "d_out": d_out,
        "r": draw(st.integers(1, min(d_in, d_out))),
        "bias": draw(st.booleans()),
        "batch": draw(batches),
        "seed": draw(seeds),
    }
    return make_layer(case, **(drawn | fixed))


cases = st.sampled_from(CASES)
