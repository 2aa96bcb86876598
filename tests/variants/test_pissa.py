"""PiSSA compared with its formula in dense matrices and with PEFT."""

import math

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

import lora_func as lf
from lora_func.testing import Case, layers
from lora_func.variants import _difference
from tests.support.parity import relative

PISSA = Case("pissa", lambda r: lf.PiSSA(r=r, alpha=3.0))


@given(layer=layers(PISSA, scrambled=True))
def test_formula(layer):
    p, W = layer.leaves, layer.module.weight
    W = W + 3.0 / p["A"].shape[0] * (p["B"] @ p["A"] - p["_B0"] @ p["_A0"])
    torch.testing.assert_close(layer.apply(), F.linear(layer.x, W, layer.module.bias))
    norm = layer.variant.delta_norm(p, None)
    torch.testing.assert_close(norm, torch.linalg.norm(W - layer.module.weight))


@pytest.mark.parametrize("alpha", [None, 1.0, 24.0])
@pytest.mark.parametrize("niter", [None, 4])
def test_the_start_is_the_principal_part_at_any_scale(alpha, niter):
    model = nn.Sequential(nn.Linear(20, 12)).double()
    U, S, Vh = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
    model[0].weight.data = (U * S**3) @ Vh  # a spectrum steep enough for the randomised SVD
    params = lf.init(model, lf.PiSSA(r=3, alpha=alpha, niter=niter), dtype=torch.float64)
    A, B = params["0.pissa._A0"], params["0.pissa._B0"]
    principal = (U[:, :3] * S[:3] ** 3) @ Vh[:3]
    s = params["0.pissa._scale"]
    assert relative(s * B @ A, principal) < (1e-12 if niter is None else 0.05)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0))
    assert torch.equal(A, params["0.pissa.A"])
    assert torch.equal(B, params["0.pissa.B"])


def test_the_randomised_start_is_the_same_for_a_seed_alone():
    model = nn.Sequential(nn.Linear(20, 12))
    one, again, other = (lf.init(model, lf.PiSSA(r=3, niter=1), seed=s) for s in (0, 0, 1))
    assert torch.equal(one["0.pissa.A"], again["0.pissa.A"])
    assert not torch.equal(one["0.pissa.A"], other["0.pissa.A"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alpha", [4.0, 7.0])
def test_parity_with_peft(bias, alpha):
    """In float32, the highest precision of PEFT's init; PEFT's base weight is the residual."""
    r, s = 4, alpha / 4
    config = peft.LoraConfig(r=r, lora_alpha=alpha, init_lora_weights="pissa", target_modules=["0"])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64, bias=bias)).requires_grad_(False)
    params = lf.init(model, lf.PiSSA(r=r, alpha=alpha))
    base = model[0].weight.clone()
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(48, 64, bias=bias)), config)
    layer = theirs.base_model.model[0]
    layer.get_base_layer().load_state_dict(model[0].state_dict())
    layer.pissa_init("default", "pissa")
    with torch.no_grad():
        residual = base - s * params["0.pissa._B0"] @ params["0.pissa._A0"]
    assert relative(layer.get_base_layer().weight, residual) < 1e-5
    pairs = [
        (layer.lora_A["default"].weight, params["0.pissa.A"]),
        (layer.lora_B["default"].weight, params["0.pissa.B"]),
    ]
    for their, ours in pairs:
        their.data.normal_(std=0.2)
        ours.data = their.data.clone()
    x = torch.randn(2, 7, 48, requires_grad=True)
    y, their_y = lf.fcall(model, params, x), layer(x)
    assert relative(y, their_y) < 1e-5
    weights = torch.randn_like(y)
    ours = torch.autograd.grad((y * weights).sum(), [x, *(p for _, p in pairs)])
    expected = torch.autograd.grad((their_y * weights).sum(), [x, *(p for p, _ in pairs)])
    assert all(relative(a, b) < 1e-5 for a, b in zip(ours, expected, strict=True))
    theirs.base_model.model[0].merge()
    leaves = {key.rsplit(".", 1)[1]: leaf for key, leaf in params.items()}
    assert relative(_difference.weight(base, leaves), layer.get_base_layer().weight) < 1e-5


def test_the_base_is_not_written():
    model = nn.Sequential(nn.Linear(8, 8))
    before = model[0].weight.clone()
    lf.init(model, lf.PiSSA(r=4))
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"niter": -1}, "niter: got -1, expected an integer of at least 0"),
        ({"niter": 2.0}, r"niter: got 2\.0, expected an integer"),
        ({"alpha": 0}, "alpha: got 0, expected a finite number above 0"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.PiSSA(**settings)


@pytest.mark.parametrize(("value", "r"), [(math.nan, 2), (1.0, 4)])
def test_refuses_at_init(value, r):
    model = nn.Sequential(nn.Linear(8, 3))
    model[0].weight.data[0, 0] = value
    message = "0: pissa: r = 4 exceeds" if r == 4 else "0: pissa: the weight holds NaN or infinity"
    with pytest.raises(ValueError, match=message):
        lf.init(model, lf.PiSSA(r=r))
