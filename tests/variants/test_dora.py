"""DoRA compared with its formula in dense matrices and with PEFT."""

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

import lora_func as lf
from lora_func import Affine
from lora_func.testing import Case, layers
from lora_func.variant import prepared
from lora_func.variants import dora
from tests.support.models import scramble
from tests.support.parity import assert_parity, relative, same

DORA = Case("dora", lambda r: lf.DoRA(r=r, alpha=3.0))


def formula(leaves, W, detached=True):
    direction = W + 3.0 / leaves["A"].shape[0] * leaves["B"] @ leaves["A"]
    n = direction.norm(dim=1)
    return (leaves["m"] / (n.detach() if detached else n))[:, None] * direction


@given(layer=layers(DORA, scrambled=True))
def test_formula(layer):
    W = formula(layer.leaves, layer.module.weight)
    torch.testing.assert_close(layer.apply(), F.linear(layer.x, W, layer.module.bias))
    torch.testing.assert_close(W.norm(dim=1), layer.leaves["m"].abs())


def test_start():
    model = nn.Sequential(nn.Linear(4, 3))
    params = lf.init(model, lf.DoRA(r=2))
    torch.testing.assert_close(params["0.dora.m"], model[0].weight.norm(dim=1))
    assert params["0.dora._w_sqnorm"].shape == (3,)


def test_the_norm_is_held_constant_by_the_derivative():
    layer = DORA.layer(d_in=48, d_out=64, r=8, scrambled=True)
    W = layer.module.weight

    def gradient(of):
        return torch.func.grad(lambda leaves: of(leaves).square().sum())(layer.trained)["B"]

    ours = gradient(layer.apply)
    theirs = [
        gradient(lambda leaves, d=d: F.linear(layer.x, formula(leaves, W, d), layer.module.bias))
        for d in (True, False)
    ]
    assert relative(ours, theirs[0]) < 1e-12
    assert relative(ours, theirs[1]) > 0.02


def test_the_bias_is_not_scaled():
    layer = DORA.layer(d_in=48, d_out=64, scrambled=True)
    W, b = layer.module.weight, layer.module.bias
    n = (W + 1.5 * layer.leaves["B"] @ layer.leaves["A"]).norm(dim=1)
    changed = formula(layer.leaves, W)
    assert relative(layer.apply(), F.linear(layer.x, changed, b)) < 1e-12
    assert relative(layer.apply(), F.linear(layer.x, changed, layer.leaves["m"] / n * b)) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_of_zeros_stays_what_it_is(dtype):
    model = nn.Sequential(nn.Linear(4, 3)).to(dtype)
    with torch.no_grad():
        model[0].weight[1] = 0
    params = lf.init(model, lf.DoRA(r=2), dtype=dtype)
    x = torch.randn(5, 4, dtype=dtype)
    y = lf.fcall(model.requires_grad_(False), params, x)
    assert torch.equal(y, model(x))
    gradients = torch.autograd.grad(y.float().sum(), [*lf.partition(params)[0].values()])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("left", [0.5, 0.05, 0.0])
def test_a_row_that_training_has_all_but_erased_stays_finite(dtype, left):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16, bias=False)).to(dtype).requires_grad_(False)
    params = lf.init(model, lf.DoRA(r=4, alpha=4))
    W, A = model[0].weight.double(), params["0.dora.A"].detach().double()
    params["0.dora.B"] = ((left - 1) * W @ torch.linalg.pinv(A)).float().requires_grad_()
    y = lf.fcall(model, params, torch.randn(32, 4).to(dtype))
    assert y.isfinite().all()
    leaves = {key.rsplit(".", 1)[1]: leaf for key, leaf in params.items()}
    W = Affine(model[0].weight)
    more = dora._more(W, prepared(dora.prepare, leaves, W, dtype))
    assert more.max() <= 1.1 * torch.finfo(dtype).eps ** -0.5
    trained = [*lf.partition(params)[0].values()]
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.double().sum(), trained))


def test_rows_below_the_smallest_normal_number_start_as_they_are():
    model = nn.Sequential(nn.Linear(8, 4)).requires_grad_(False)
    model[0].weight[0] *= 1e-4
    model.half()
    x = torch.full((1, 8), 100.0).half()
    params = lf.init(model, lf.DoRA(r=2), dtype=torch.float16)
    assert torch.equal(lf.fcall(model, params, x), model(x))


def test_factors_may_be_narrower_than_the_magnitudes():
    model = nn.Sequential(nn.Linear(8, 4)).requires_grad_(False)
    params = scramble(lf.init(model, lf.DoRA(r=2)))
    params |= {key: leaf.bfloat16() for key, leaf in params.items() if key[-1] in "AB"}
    x = torch.randn(3, 8)
    merged = torch.func.functional_call(model, lf.merge(model, params), (x,))
    torch.testing.assert_close(lf.fcall(model, params, x), merged, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", [1, 8])
def test_parity_with_peft(bias, r):
    assert_parity(
        lf.DoRA(r=r, alpha=5.0),
        peft.LoraConfig(r=r, lora_alpha=5.0, use_dora=True, target_modules=["0"]),
        lambda layer: {
            "A": (layer.lora_A["default"].weight, same),
            "B": (layer.lora_B["default"].weight, same),
            "m": (layer.lora_magnitude_vector["default"].weight, same),
        },
        bias=bias,
    )


def test_a_rank_above_the_smaller_side():
    model = nn.Sequential(nn.Linear(8, 3))
    params, x = scramble(lf.init(model, lf.DoRA(r=12))), torch.randn(5, 8)
    assert params["0.dora.A"].shape == (12, 8)
    merged = lf.merge(model, params)
    expected = nn.functional.linear(x, merged["0.weight"], merged["0.bias"])
    torch.testing.assert_close(lf.fcall(model, params, x), expected)
