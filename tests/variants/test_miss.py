"""MiSS compared with its formula entry by entry and with PEFT."""

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lora_func as lf
from lora_func.testing import Case, layers
from tests.support.parity import assert_parity, same

STANDARD = Case("miss", lambda r: lf.MiSS(r=r))
MINI = Case(
    "miss-mini",
    lambda r: lf.MiSS(r=r, form="mini", mini_r=3),
    fit=lambda d_in, d_out, r: (d_in, 3 * d_out, r),
)
BAT = Case(
    "miss-bat",
    lambda r: lf.MiSS(r=3, form="bat"),
    fit=lambda d_in, d_out, r: (3 * d_in, 3 * d_out, 3),
)


@given(data=st.data(), case=st.sampled_from([STANDARD, MINI]))
def test_formula(data, case):
    layer = data.draw(layers(case, scrambled=True))
    block, W = layer.leaves["block"], layer.module.weight
    d_out, d_in = W.shape
    r, m = block.shape
    change = torch.tensor([[block[i % r, o % m] for i in range(d_in)] for o in range(d_out)])
    torch.testing.assert_close(layer.weight(), W + change)


@given(data=st.data())
def test_formula_of_bat(data):
    layer = data.draw(layers(BAT, scrambled=True))
    D, W = layer.leaves["block"], layer.module.weight
    adapted, eye = layer.weight(), torch.eye(3, dtype=W.dtype)
    for o in range(W.shape[0] // 3):
        for i in range(W.shape[1] // 3):
            at = slice(3 * o, 3 * o + 3), slice(3 * i, 3 * i + 3)
            torch.testing.assert_close(adapted[at], (W[at] + eye) @ (eye + D[o]) - eye)


def test_a_mini_block_as_wide_as_the_output_is_the_standard_one():
    layer = STANDARD.layer(d_in=7, d_out=6, r=2, scrambled=True)
    wide = Case("mini", lambda r: lf.MiSS(r=r, form="mini", mini_r=6)).layer(d_in=7, d_out=6, r=2)
    torch.testing.assert_close(wide.apply(layer.leaves), layer.apply())


SETTINGS = {
    "standard": (lf.MiSS(r=8), {"r": 8}),
    "uneven": (lf.MiSS(r=10), {"r": 10}),
    "mini": (lf.MiSS(r=8, form="mini", mini_r=16), {"r": 8, "init_weights": "mini", "mini_r": 16}),
    "bat": (lf.MiSS(r=8, form="bat"), {"r": 8, "init_weights": "bat"}),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", SETTINGS)
def test_parity_with_peft(kind, bias, dtype):
    cfg, theirs = SETTINGS[kind]
    assert_parity(
        cfg,
        peft.MissConfig(target_modules=["0"], **theirs),
        lambda layer: {"block": (layer.miss_block["default"], same)},
        bias=bias,
        dtype=dtype,
        spread=0.1,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "half"}, "form: got 'half', expected one of 'standard', 'mini', 'bat'"),
        ({"mini_r": 0}, "mini_r: got 0, expected an integer of at least 1"),
        ({"form": "bat", "dropout": 0.1}, 'form "bat" multiplies the weight'),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.MiSS(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 7}, "r = 7 exceeds d_in = 6"),
        ({"r": 2, "form": "mini", "mini_r": 3}, "mini_r = 3 does not divide d_out = 4"),
        ({"r": 4, "form": "bat"}, "r = 4 does not divide d_in = 6 and d_out = 4"),
    ],
)
def test_refuses_a_layer(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), lf.MiSS(**settings))
