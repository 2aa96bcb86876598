"""HiRA compared with its formula and with PEFT."""

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lora_func as lf
from lora_func.testing import Case, layers
from tests.support.parity import assert_parity, same

CASE = Case("hira", lambda r: lf.HiRA(r=r))


@given(data=st.data())
def test_formula(data):
    layer = data.draw(layers(CASE, scrambled=True))
    p, W = layer.leaves, layer.module.weight
    torch.testing.assert_close(layer.weight(), W * (1 + p["B"] @ p["A"]))


def test_zeros_of_the_weight_stay_and_the_rank_of_the_change_exceeds_r():
    layer = CASE.layer(d_in=9, d_out=8, r=1, scrambled=True, zero_rows=True)
    change = layer.weight() - layer.module.weight
    assert not change[:4].any()
    assert torch.linalg.matrix_rank(change) == 4


def test_a_row_of_ones_makes_it_a_gain_for_each_output():
    layer = CASE.layer(d_in=6, d_out=5, r=1, bias=False, scrambled=True)
    scaled = layer.apply({"A": torch.ones_like(layer.leaves["A"])})
    torch.testing.assert_close(scaled, layer.frozen() * (1 + layer.leaves["B"][:, 0]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parity_with_peft(bias, dtype):
    assert_parity(
        lf.HiRA(r=4),
        peft.HiraConfig(r=4, target_modules=["0"]),
        lambda layer: {"A": (layer.hira_A["default"], same), "B": (layer.hira_B["default"], same)},
        bias=bias,
        dtype=dtype,
    )
