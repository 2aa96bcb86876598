"""IA3 on both sides compared with its formula and with PEFT."""

import peft
import pytest
import torch
from hypothesis import given

import lora_func as lf
from lora_func.testing import Case, layers
from tests.support.parity import assert_parity


@given(layer=layers(Case("ia3", lambda r: lf.IA3()), scrambled=True))
def test_formula_of_the_output_side(layer):
    torch.testing.assert_close(layer.apply(), layer.leaves["g"] * layer.module(layer.x))


@given(layer=layers(Case("ia3_ff", lambda r: lf.IA3FF()), scrambled=True))
def test_formula_of_the_input_side(layer):
    torch.testing.assert_close(layer.apply(), layer.module(layer.x * layer.leaves["g"]))


def test_gating_an_up_projection_is_gating_the_input_of_the_down_projection():
    up, down = torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(6, 4)
    g, x = torch.randn(6), torch.randn(3, 4)
    gate = torch.randn(3, 6)
    outputs, inputs = {".ia3.g": g}, {".ia3_ff.g": g}
    torch.testing.assert_close(
        down(gate * lf.fcall(up, outputs, x)), lf.fcall(down, inputs, gate * up(x))
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("side", ["output", "input"])
def test_parity_with_peft(bias, side):
    assert_parity(
        lf.IA3() if side == "output" else lf.IA3FF(),
        peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if side == "input" else []),
        lambda layer: {"g": (layer.ia3_l["default"], torch.flatten)},
        bias=bias,
    )


def test_steps_are_not_rounded_away_on_a_bfloat16_base():
    model = torch.nn.Linear(4, 4).to(torch.bfloat16)
    params = lf.init(model, lf.IA3())
    assert params[".ia3.g"].dtype == torch.float32
    params[".ia3.g"] = params[".ia3.g"] + 1e-4
    assert not torch.equal(params[".ia3.g"], torch.ones(4))


def test_a_gain_of_zero_silences_the_output():
    model = torch.nn.Linear(4, 4)
    y = lf.fcall(model, {".ia3.g": torch.zeros(4)}, torch.randn(2, 4))
    assert torch.equal(y, torch.zeros(2, 4))
