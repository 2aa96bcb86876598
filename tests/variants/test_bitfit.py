"""BitFit compared with its formula and with PEFT's BEFT."""

import peft
import pytest
import torch
from torch import nn

import lora_func as lf
from tests.support.parity import assert_parity


def test_formula():
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    delta = torch.randn(3)
    torch.testing.assert_close(lf.fcall(model, {".bitfit.delta": delta}, x), model(x) + delta)


def test_parity_with_peft():
    """The layer has a bias, because PEFT cannot merge into a layer without one."""
    assert_parity(
        lf.BitFit(),
        peft.BeftConfig(target_modules=["0"]),
        lambda layer: {"delta": (layer.beft_bias["default"], torch.flatten)},
    )


@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term")
def test_parity_with_peft_on_a_layer_without_a_bias():
    assert_parity(
        lf.BitFit(allow_new_bias=True),
        peft.BeftConfig(target_modules=["0"]),
        lambda layer: {"delta": (layer.beft_bias["default"], torch.flatten)},
        bias=False,
        merges=False,
    )


def test_a_layer_without_a_bias_is_refused():
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    with pytest.raises(
        ValueError, match="0: bitfit: the layer has no bias; leave it out, or pass allow_new_bias"
    ):
        lf.init(model, lf.BitFit())
    assert list(lf.init(model, lf.BitFit(allow_new_bias=True))) == ["0.bitfit.delta"]


def test_refuses():
    with pytest.raises(TypeError, match="allow_new_bias: got 1, expected True or False"):
        lf.BitFit(allow_new_bias=1)
