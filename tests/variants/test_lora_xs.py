"""LoRA-XS compared with its formula, and with PEFT's LoRA of the same factors."""

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lora_func as lf
from lora_func.testing import Case, layers

CASE = Case("lora-xs", lambda r: lf.LoRAXS(r=r, alpha=3.0))


@given(data=st.data())
def test_formula(data):
    layer = data.draw(layers(CASE, scrambled=True))
    p, W = layer.leaves, layer.module.weight
    U, S, Vh = torch.linalg.svd(W)
    r = len(p["R"])
    principal = (U[:, :r] * S[:r]) @ Vh[:r]
    torch.testing.assert_close(p["_B"] @ p["_A"], principal)
    change = p["_scale"] * p["_B"] @ p["R"] @ p["_A"]
    torch.testing.assert_close(layer.weight(), W + change)
    whole = layer.with_leaves({"R": torch.eye(r, dtype=W.dtype)})
    torch.testing.assert_close(whole.weight(), W + p["_scale"] * principal)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parity_with_peft_given_the_same_factors(dtype):
    """The gradient of R is that of B, from the left by Uᵀ."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 64)).to(dtype).requires_grad_(False)
    params = lf.init(model, lf.LoRAXS(r=4, alpha=8.0), dtype=dtype)
    params["0.lora_xs.R"].data.normal_()
    A, U = params["0.lora_xs._A"], params["0.lora_xs._B"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    layer = peft.get_peft_model(torch.nn.Sequential(model[0]), config).base_model.model[0]
    layer.lora_A["default"].weight.data = A.clone()
    layer.lora_B["default"].weight.data = U @ params["0.lora_xs.R"].detach()
    x = torch.randn(5, 48, dtype=dtype)
    y, theirs = lf.fcall(model, params, x), layer(x)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(y, theirs, rtol=tolerance, atol=10 * tolerance)
    y.square().sum().backward()
    theirs.square().sum().backward()
    of_core = U.T @ layer.lora_B["default"].weight.grad
    gradient = params["0.lora_xs.R"].grad
    assert ((gradient - of_core).abs().max() / of_core.abs().max()) < 10 * tolerance


def test_the_start_of_the_authors():
    fresh = CASE.layer(d_in=9, d_out=8, r=3)
    assert not fresh.leaves["R"].any()
    drawn = Case("xs", lambda r: lf.LoRAXS(r=r, sigma=1e-5)).layer(d_in=9, d_out=8, r=3)
    assert 0 < drawn.leaves["R"].abs().max() < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"sigma": -1.0}, "sigma: got -1.0, expected at least 0"), ({"r": 0}, "r: got 0")],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.LoRAXS(**settings)


def test_refuses_a_rank_above_the_smaller_side():
    with pytest.raises(ValueError, match=r"r = 64 exceeds min\(d_out, d_in\) = 4"):
        lf.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), lf.LoRAXS())
