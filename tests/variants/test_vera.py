"""VeRA compared with its formula in dense matrices and with PEFT."""

import math

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

import lora_func as lf
from lora_func.testing import Case, layers
from tests.support.parity import assert_parity, same

VERA = Case("vera", lambda r: lf.VeRA(r=r))


@given(layer=layers(VERA, scrambled=True))
def test_formula(layer):
    p = layer.leaves
    W = layer.module.weight + p["lambda_b"].diag() @ p["_B"] @ p["lambda_d"].diag() @ p["_A"]
    torch.testing.assert_close(layer.apply(), F.linear(layer.x, W, layer.module.bias))


def test_all_layers_share_the_projections_of_the_widest():
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 20))
    params = lf.init(model, lf.VeRA(r=600, d_initial=0.3))
    A, B = params["*.vera._A"], params["*.vera._B"]
    assert A.shape == (600, 40)
    assert B.shape == (40, 600)
    for leaf, bound in ((A, math.sqrt(6 / 40)), (B, math.sqrt(6 / 600))):
        assert 0.99 * bound < leaf.abs().max() <= bound
        assert not leaf.requires_grad
    assert torch.equal(params["0.vera.lambda_d"], torch.full((600,), 0.3))
    x = torch.randn(3, 30)
    assert torch.equal(lf.fcall(model.requires_grad_(False), params, x), model(x))


def test_a_narrower_layer_uses_the_first_rows_and_columns():
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4)).double()
    params = lf.init(model, lf.VeRA(r=3), dtype=torch.float64)
    for key in params:
        params[key] = torch.randn_like(params[key])
    A, B = params["*.vera._A"], params["*.vera._B"]
    x = y = torch.randn(2, 6).double()
    for site, layer in model.named_children():
        d, b = (params[f"{site}.vera.lambda_{name}"] for name in "db")
        down, up = A[:, : layer.in_features], B[: layer.out_features]
        y = F.linear(y, layer.weight + b.diag() @ up @ d.diag() @ down, layer.bias)
    torch.testing.assert_close(lf.fcall(model, params, x), y)


def test_stacks_of_mixed_rank():
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double(), torch.randn(3, 6).double()
    adapters = [lf.init(model, lf.VeRA(r=r), seed=r, dtype=torch.float64) for r in (2, 5)]
    adapters = [
        {k: v.detach() + ("lambda" in k) * torch.randn_like(v) for k, v in a.items()}
        for a in adapters
    ]
    stacked = lf.stack(adapters)
    outputs = torch.vmap(lf.fcall, in_dims=(None, 0, None))(model, stacked, x)
    expected = torch.stack([lf.fcall(model, adapter, x) for adapter in adapters])
    torch.testing.assert_close(outputs, expected)
    for one, again in zip(adapters, lf.unstack(stacked), strict=True):
        assert one.keys() == again.keys()
        assert all(torch.equal(one[key], again[key]) for key in one)


@pytest.mark.parametrize("bias", [True, False])
def test_parity_with_peft(bias):
    assert_parity(
        lf.VeRA(r=32),
        peft.VeraConfig(r=32, target_modules=["0"]),
        lambda layer: {
            "lambda_d": (layer.vera_lambda_d["default"], same),
            "lambda_b": (layer.vera_lambda_b["default"], same),
        },
        constants=lambda layer: {
            "_A": layer.vera_A["default"],
            "_B": layer.vera_B["default"],
        },
        bias=bias,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r: got 0, expected an integer of at least 1"),
        ({"d_initial": 0}, "d_initial: got 0, at which every gradient is zero"),
        ({"d_initial": math.nan}, "d_initial: got nan, expected a finite number"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.VeRA(**settings)
