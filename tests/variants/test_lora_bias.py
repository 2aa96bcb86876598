"""LoRA with a trained bias, compared with PEFT."""

import peft
import pytest
import torch
from torch import nn

import lora_func as lf
from tests.support.parity import assert_parity, same


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rslora", [False, True])
def test_parity_with_peft(dtype, rslora):
    assert_parity(
        lf.LoRA(r=4, alpha=8, rslora=rslora, bias=True),
        peft.LoraConfig(r=4, lora_alpha=8, lora_bias=True, use_rslora=rslora, target_modules=["0"]),
        lambda layer: {
            "A": (layer.lora_A["default"].weight, same),
            "B": (layer.lora_B["default"].weight, same),
            "c": (layer.lora_B["default"].bias, same),
        },
        dtype=dtype,
    )


def test_a_layer_without_a_bias_gets_one():
    model, x = nn.Sequential(nn.Linear(4, 3, bias=False)), torch.randn(2, 4)
    params = lf.init(model, lf.LoRA(r=2, bias=True))
    assert torch.equal(lf.fcall(model, params, x), model(x))
    params["0.lora_bias.c"].data += 1
    torch.testing.assert_close(lf.fcall(model, params, x), model(x) + 2)
    torch.testing.assert_close(lf.merge(model, params)["0.bias"], torch.full((3,), 2.0))


def test_the_flag_is_a_flag():
    with pytest.raises(TypeError, match="bias: got 1"):
        lf.LoRA(bias=1)


def test_the_keys_say_that_the_bias_is_trained():
    params = lf.init(nn.Sequential(nn.Linear(4, 4)), lf.LoRA(r=2, bias=True))
    assert [*params] == [f"0.lora_bias.{leaf}" for leaf in ("A", "B", "_scale", "c")]
