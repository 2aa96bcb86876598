"""DeLoRA compared with its formula in dense matrices and with PEFT."""

import math

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import lora_func as lf
from lora_func.testing import Case, layers
from tests.support.parity import assert_parity, same

ZERO_B = Case("delora", lambda r: lf.DeLoRA(r=r))
COPY = Case("delora", lambda r: lf.DeLoRA(r=r, init="frozen_copy"))


def term(strength, A, B, W):
    A = A / A.norm(dim=1, keepdim=True).clamp_min(1e-4)
    B = B / B.norm(dim=0).clamp_min(1e-4)
    return strength / len(A) * B @ A * W.norm(dim=0)


def delta(p, W):
    copy = term(p["lambda"], p["_A0"], p["_B0"], W) if "_A0" in p else 0
    return term(p["lambda"], p["A"], p["B"], W) - copy


@given(data=st.data(), case=st.sampled_from([ZERO_B, COPY]))
def test_formula_and_bounds(data, case):
    layer = data.draw(layers(case, scrambled=True))
    p, W = layer.leaves, layer.module.weight
    change = delta(p, W)
    torch.testing.assert_close(layer.apply(), F.linear(layer.x, W + change, layer.module.bias))
    norm = layer.variant.delta_norm(p, None)
    torch.testing.assert_close(norm, change.norm(), rtol=1e-6, atol=1e-6)
    bound = p["lambda"].abs() * W.norm(dim=0).max() * (2 if "_A0" in p else 1)
    assert change.norm() <= bound * (1 + 1e-9)


def test_gradients_are_orthogonal_to_what_is_normalised():
    layer = ZERO_B.layer(d_in=7, d_out=5, r=3, scrambled=True)
    gradient = torch.func.grad(lambda leaves: layer.apply(leaves).square().sum())(layer.trained)
    for leaf, axis in (("A", 1), ("B", 0)):
        along = (gradient[leaf] * layer.leaves[leaf]).sum(axis)
        assert (along.abs() < 1e-10 * gradient[leaf].norm()).all()


def test_the_start_of_the_frozen_copy_is_a_fixed_point_of_the_strength():
    layer = COPY.layer()
    gradient = torch.func.grad(lambda leaves: layer.apply(leaves).square().sum())(layer.trained)
    assert gradient["lambda"] == 0
    assert layer.leaves["B"].abs().max() <= 1 / math.sqrt(2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spread", [1.0, 1e-5])
def test_parity_with_peft(bias, spread):
    """The small spread tests norms below the floor."""
    assert_parity(
        lf.DeLoRA(r=4),
        peft.DeloraConfig(r=4, target_modules=["0"]),
        lambda layer: {
            "A": (layer.delora_A["default"], same),
            "B": (layer.delora_B["default"], same),
            "lambda": (layer.delora_lambda["default"], same),
        },
        bias=bias,
        spread=spread,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r: got 0, expected an integer of at least 1"),
        ({"lambda_": 0}, "lambda_: got 0, at which every gradient is zero"),
        ({"lambda_": math.inf}, "lambda_: got inf, expected a finite number"),
        ({"init": "zeros"}, "init: got 'zeros', expected one of 'zero_b', 'frozen_copy'"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.DeLoRA(**settings)
