"""HRA compared with its formula in dense matrices and with PEFT."""

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

import lora_func as lf
from lora_func.testing import Case, layers
from lora_func.variants import hra
from tests.support.parity import assert_parity, relative

HRA = Case("hra", lambda r: lf.HRA(r=r), fit=lambda d_in, d_out, r: (d_in, d_out, 2 * r))


def chain(U):
    R = torch.eye(U.shape[1], dtype=U.dtype)
    for u in U:
        R = R - 2 * torch.outer(R @ u, u) / u.dot(u)
    return R


@given(layer=layers(HRA, scrambled=True))
def test_formula(layer):
    R = chain(layer.leaves["U"])
    y = F.linear(layer.x, layer.module.weight @ R, layer.module.bias)
    torch.testing.assert_close(layer.apply(), y, rtol=1e-9, atol=1e-9)


def test_the_order_matters():
    layer = HRA.layer(d_in=48, d_out=64, r=4, scrambled=True)
    reversed_ = layer.module.weight @ chain(layer.leaves["U"].flip(0))
    assert relative(layer.apply(), F.linear(layer.x, reversed_, layer.module.bias)) > 0.1


def test_the_chain_is_orthogonal():
    layer = HRA.layer(d_in=12, d_out=9, r=3, scrambled=True)
    W, changed = layer.module.weight, layer.weight(layer.W)
    torch.testing.assert_close(changed @ changed.T, W @ W.T)
    R = hra.weight(torch.eye(12, dtype=torch.float64), layer.leaves)
    torch.testing.assert_close(R @ R.T, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.det(R), torch.ones((), dtype=torch.float64))
    assert torch.linalg.matrix_rank(R - torch.eye(12)) <= 6


def test_gradients_at_the_start():
    layer = HRA.layer(d_in=12, d_out=9, r=2)
    U = layer.leaves["U"]
    (gradient,) = torch.func.grad(lambda leaves: layer.apply(leaves).square().sum())(
        layer.trained
    ).values()
    torch.testing.assert_close(gradient[::2], -gradient[1::2])
    assert ((gradient * U).sum(1).abs() < 1e-12 * gradient.norm()).all()


def test_start():
    U = lf.init(nn.Sequential(nn.Linear(300, 4)), lf.HRA(r=8))["0.hra.U"]
    assert U.shape == (8, 300)
    assert torch.equal(U[::2], U[1::2])
    assert 0.49 < U.abs().max() <= 0.5


def test_a_vector_of_zeros_has_a_derivative_too():
    layer = HRA.layer(d_in=5, d_out=4, r=2, scrambled=True, dtype=torch.float32)
    padded = {"U": torch.cat([layer.leaves["U"], torch.zeros(2, 5)])}
    torch.set_flush_denormal(True)
    try:
        y, slope = torch.func.jvp(layer.apply, (padded,), ({"U": torch.randn(6, 5)},))
    finally:
        torch.set_flush_denormal(False)
    assert y.isfinite().all()
    assert slope.isfinite().all()


def test_a_vector_of_zeros_reflects_nothing():
    layer = HRA.layer(d_in=5, d_out=4, r=2, scrambled=True)
    U = layer.leaves["U"]
    padded = {"U": torch.cat([U, torch.zeros(2, 5)])}
    torch.testing.assert_close(layer.apply(padded), layer.apply())
    gradient = torch.func.grad(lambda leaves: layer.apply(leaves).square().sum())(padded)["U"]
    assert gradient.isfinite().all()
    assert not gradient[4:].any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", [2, 8])
def test_parity_with_peft(bias, r):
    assert_parity(
        lf.HRA(r=r),
        peft.HRAConfig(r=r, target_modules=["0"]),
        lambda layer: {"U": (layer.hra_u["default"], torch.t)},
        bias=bias,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 3}, "r: got 3, expected an even number; reflections come in pairs"),
        ({"rank_pattern": {"q": 1}}, "r: got 1, expected an even number"),
        ({"r": 0}, "r: got 0, expected an integer of at least 1"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.HRA(**settings)
