"""LoHa compared with its formula in dense matrices and with PEFT."""

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lora_func as lf
from lora_func.testing import Case, layers
from tests.support.parity import assert_parity, same

CASE = Case("loha", lambda r: lf.LoHa(r=r, alpha=3.0))


@given(data=st.data())
def test_formula(data):
    layer = data.draw(layers(CASE, scrambled=True))
    p = layer.leaves
    change = p["_scale"] * (p["B1"] @ p["A1"]) * (p["B2"] @ p["A2"])
    torch.testing.assert_close(layer.weight(), layer.module.weight + change)


def test_the_rank_of_the_change_is_the_square_of_r():
    layer = CASE.layer(d_in=12, d_out=11, r=2, scrambled=True)
    assert torch.linalg.matrix_rank(layer.weight() - layer.module.weight) == 4


def test_the_pairs_may_be_exchanged():
    layer = CASE.layer(d_in=7, d_out=5, r=2, scrambled=True)
    p = layer.leaves
    swapped = {"A1": p["A2"], "B1": p["B2"], "A2": p["A1"], "B2": p["B1"]}
    torch.testing.assert_close(layer.apply(swapped), layer.apply())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("settings", [{"r": 4}, {"r": 4, "alpha": 6}])
def test_parity_with_peft(settings, bias, dtype):
    names = {"A1": "hada_w1_b", "B1": "hada_w1_a", "A2": "hada_w2_b", "B2": "hada_w2_a"}
    assert_parity(
        lf.LoHa(**settings),
        peft.LoHaConfig(target_modules=["0"], **{"alpha": settings["r"]} | settings),
        lambda layer: {
            leaf: (getattr(layer, name)["default"], same) for leaf, name in names.items()
        },
        bias=bias,
        dtype=dtype,
    )


def test_the_usual_scale_is_one():
    assert lf.LoHa(r=4).scale == 1
    assert lf.LoHa(r=4, alpha=2).scale == 0.5
