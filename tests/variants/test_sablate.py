"""SAblate compared with its formula, and with what it promises: nothing grows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.testing import Case, layers
from lora_func.variants import sablate
from tests.support.cases import WIDE_RANK

CASE = Case("sablate", lambda r: lf.SAblate(r=r, k=2, coeff=0.7), **WIDE_RANK)


def directions(leaves):
    Q, R = torch.linalg.qr(leaves["C"])
    return leaves["_U"] @ (Q * R.diagonal().sign())


@given(data=st.data())
def test_formula(data):
    layer = data.draw(layers(CASE, scrambled=True))
    W, p = layer.module.weight, layer.leaves
    D = directions(p)
    torch.testing.assert_close(layer.weight(), W - D @ torch.diag(0.7 * p["alpha"]) @ D.mT @ W)


def test_a_whole_strength_removes_the_directions_from_the_outputs():
    whole = Case("sablate", lambda r: lf.SAblate(r=r, k=2), **WIDE_RANK)
    layer = whole.layer(d_in=7, d_out=6, r=3, bias=False, scrambled=True)
    ones = layer.with_leaves({"alpha": torch.ones(2, dtype=torch.float64)})
    left = ones.apply() @ directions(ones.leaves)
    torch.testing.assert_close(left, torch.zeros_like(left))


def test_no_singular_value_grows_within_the_bounds():
    layer = CASE.layer(d_in=7, d_out=6, r=4, scrambled=True)
    bounded = layer.with_leaves(sablate.project(layer.leaves))
    assert ((bounded.leaves["alpha"] >= 0) & (bounded.leaves["alpha"] <= 1)).all()
    before = torch.linalg.svdvals(layer.module.weight)
    assert (torch.linalg.svdvals(bounded.weight()) <= before + 1e-12).all()


def test_the_length_of_a_direction_has_no_gradient():
    layer = CASE.layer(d_in=7, d_out=6, r=4, scrambled=True)
    C = layer.leaves["C"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer.apply({"C": C}).square().sum(), C)
    assert abs((C[:, 0] * gradient[:, 0]).sum()) < 1e-10 < gradient.norm()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coeff": 1.5}, r"coeff: got 1.5, expected a number from 0 to 1"),
        ({"k": 9, "r": 8}, "k: got 9, expected at most r = 8"),
        ({"k": 0}, "k: got 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.SAblate(**settings)


def test_ranks_beyond_the_weight_are_refused():
    with pytest.raises(ValueError, match="0: sablate: r = 5 exceeds"):
        lf.init(nn.Sequential(nn.Linear(8, 4)), lf.SAblate(r=5))
