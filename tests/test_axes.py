"""Axis specifications: alternatives, products, quotients, and errors that name the leaf."""

import pytest
import torch
from torch import nn

import lora_func as lf
from lora_func.variant import fit, parse_axes

KRONECKER = {"w1": parse_axes("a b"), "w2": parse_axes("d_out/a d_in/b")}
WEIGHT = {"d_out": 6, "d_in": 8}


def test_a_quotient_follows_from_the_weight():
    assert fit(KRONECKER, {"w1": (2, 4), "w2": (3, 2)}, WEIGHT) == {"w1": (), "w2": ()}
    with pytest.raises(ValueError, match=r"^w2: got shape \(3, 3\), expected \(d_out/a, d_in/b\)"):
        fit(KRONECKER, {"w1": (2, 4), "w2": (3, 3)}, WEIGHT)


def test_a_product_is_solved_for_its_unknown():
    axes = {"x": parse_axes("a*b"), "y": parse_axes("a"), "z": parse_axes("b 2")}
    fit(axes, {"x": (6,), "y": (2,), "z": (3, 2)}, {})
    with pytest.raises(ValueError, match=r"^[xz]: got shape"):
        fit(axes, {"x": (6,), "y": (2,), "z": (4, 2)}, {})
    with pytest.raises(ValueError, match=r"^[xy]: got shape"):
        fit(axes, {"x": (7,), "y": (2,), "z": (3, 2)}, {})


def test_two_unknowns_wait_for_another_leaf():
    assert fit({"x": parse_axes("a*b")}, {"x": (6,)}, {}) == {"x": ()}


def test_the_first_alternative_that_fits_is_taken():
    axes = {"B": parse_axes("r d_out | r d_in")}
    for size in (6, 8):
        assert fit(axes, {"B": (2, size)}, WEIGHT) == {"B": ()}
        assert fit(axes, {"B": (5, 2, size)}, WEIGHT) == {"B": (5,)}
    with pytest.raises(ValueError, match=r"^B: got shape \(2, 7\), expected \(r=2, d_out=6\)"):
        fit(axes, {"B": (2, 7)}, WEIGHT)


def test_a_scalar_and_a_stack_of_scalars():
    axes = {"s": parse_axes("")}
    assert fit(axes, {"s": ()}, {}) == {"s": ()}
    assert fit(axes, {"s": (3,)}, {}) == {"s": (3,)}


class Odd(lf.LinearConfig):
    pass


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"g": (3,)}, r"0: odd: .*g: got shape \(3,\), expected \(d_out=4\)"),
        ({}, "0: odd: .*g: this leaf is missing"),
        ({"g": (4,), "h": (1,)}, "0: odd: .*h: odd has no such leaf"),
    ],
)
def test_init_checks_what_a_variant_makes(made, message):
    variant = lf.Variant(
        name="odd",
        config=Odd,
        init=lambda W, cfg, generator, stats: {k: torch.zeros(s) for k, s in made.items()},
        apply=lambda W, params, x: lf.linear(x, W),
        leaves={"g": "d_out"},
    )
    lf.register(variant, overwrite=True)
    with pytest.raises(ValueError, match=message):
        lf.init(nn.Sequential(nn.Linear(4, 4)), Odd())
