"""LoRA compared with its formula in dense matrices and with PEFT."""

import math

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

import lora_func as lf
from lora_func.testing import Case, layers
from tests.support.models import scramble
from tests.support.parity import assert_parity, same

LORA = Case("lora", lambda r: lf.LoRA(r=r, alpha=5.0))


@given(layer=layers(LORA, scrambled=True))
def test_formula(layer):
    A, B = layer.leaves["A"], layer.leaves["B"]
    W = layer.module.weight + 5.0 / A.shape[0] * B @ A
    torch.testing.assert_close(layer.apply(), F.linear(layer.x, W, layer.module.bias))
    norm = layer.variant.delta_norm(layer.leaves, None)
    torch.testing.assert_close(norm, torch.linalg.norm(W - layer.module.weight))


@pytest.mark.parametrize(
    ("cfg", "scale"),
    [
        (lf.LoRA(), 2.0),
        (lf.LoRA(r=64), 2.0),
        (lf.LoRA(r=4, rslora=True), 2.0),
        (lf.LoRA(r=4, alpha=6), 1.5),
        (lf.LoRA(r=4, alpha=6, rslora=True), 3.0),
        (lf.LoRA(r=3, alpha=1, rslora=True), 1 / math.sqrt(3)),
    ],
)
def test_scale(cfg, scale):
    assert cfg.scale == scale
    params = lf.init(nn.Linear(64, 64), cfg, dtype=torch.float64)
    assert params[".lora._scale"].item() == scale


def test_start():
    leaves = lf.init(nn.Linear(100, 80), lf.LoRA(r=50))
    A, B = leaves[".lora.A"], leaves[".lora.B"]
    assert A.shape == (50, 100)
    assert B.shape == (80, 50)
    assert not B.any()
    assert A.abs().max() <= 0.1
    assert A.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.05)
    assert A.requires_grad
    assert B.requires_grad
    assert not leaves[".lora._scale"].requires_grad


def test_only_the_product_matters():
    layer = LORA.layer(scrambled=True)
    Q = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
    turned = {"A": Q @ layer.leaves["A"], "B": layer.leaves["B"] @ Q.T}
    torch.testing.assert_close(layer.apply(turned), layer.apply())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r: got 0, expected an integer of at least 1"),
        ({"r": 2.0}, r"r: got 2\.0, expected an integer"),
        ({"r": True}, "r: got True"),
        ({"alpha": 0}, "alpha: got 0, expected a finite number above 0"),
        ({"alpha": math.inf}, "alpha: got inf"),
        ({"alpha": math.nan}, "alpha: got nan"),
        ({"rank_pattern": {"q": 0}}, "r: got 0"),
        ({"alpha_pattern": {"q": -1.0}}, r"alpha: got -1\.0"),
        ({"rank_pattern": {"(": 2}}, r"'\(' is no regular expression"),
        ({"alpha": True}, "alpha: got True"),
        ({"alpha": "16"}, "alpha: got '16'"),
        ({"alpha_pattern": {"q": None}}, "alpha: got None"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.LoRA(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rslora": "no"}, "rslora: got 'no', expected True or False"),
        ({"rank_pattern": None}, "rank_pattern: got None, expected a dict"),
        ({"target_modules": None}, "target_modules: got None, expected a regular expression"),
        ({"exclude_modules": 3}, "exclude_modules: got 3, expected a regular expression"),
        ({"layers": 1.0}, r"layers: got 1\.0, expected an int"),
    ],
)
def test_refuses_kinds(settings, message):
    with pytest.raises(TypeError, match=message):
        lf.LoRA(**settings)


def test_configs_are_values():
    assert lf.LoRA(r=4) == lf.LoRA(r=4) != lf.LoRA(r=5)
    assert len({lf.LoRA(r=4), lf.LoRA(r=4, rank_pattern={"q": 2})}) == 2


def test_a_large_scale_does_not_overflow_in_float16():
    layer = nn.Linear(64, 8, bias=False).half()
    x = torch.full((2, 64), 1e3, dtype=torch.float16)
    params = lf.init(layer, lf.LoRA(r=4, alpha=4e3))
    assert torch.equal(lf.fcall(layer.requires_grad_(False), params, x), layer(x))


def test_a_rank_above_the_smaller_side():
    model = nn.Sequential(nn.Linear(8, 3))
    params, x = scramble(lf.init(model, lf.LoRA(r=12))), torch.randn(5, 8)
    assert params["0.lora.A"].shape == (12, 8)
    merged = lf.merge(model, params)
    torch.testing.assert_close(
        lf.fcall(model, params, x), nn.functional.linear(x, merged["0.weight"], merged["0.bias"])
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("r", [1, 3, 8])
def test_parity_with_peft(dtype, bias, rslora, r):
    assert_parity(
        lf.LoRA(r=r, alpha=5.0, rslora=rslora),
        peft.LoraConfig(r=r, lora_alpha=5.0, use_rslora=rslora, target_modules=["0"]),
        lambda layer: {
            "A": (layer.lora_A["default"].weight, same),
            "B": (layer.lora_B["default"].weight, same),
        },
        bias=bias,
        dtype=dtype,
    )
