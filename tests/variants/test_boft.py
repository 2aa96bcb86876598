"""BOFT compared with its butterflies in dense matrices and with PEFT."""

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.numerics import skew
from lora_func.peft import to_peft
from lora_func.testing import Case, layers
from tests.support.parity import parity_errors

CASES = [
    Case(
        f"boft-{b}-{m}",
        lambda r, b=b, m=m: lf.BOFT(block_size=b, factors=m),
        fit=lambda d_in, d_out, r, b=b, m=m: (b * 2 ** (m - 1) * d_in, d_out, r),
    )
    for b, m in ((3, 1), (2, 3), (4, 2))
]


def rotations(R):
    """blockdiag((I - S) (I + S)⁻¹) for each factor."""
    S = skew(R)
    eye = torch.eye(S.shape[-1], dtype=S.dtype)
    Q = (eye - S) @ torch.linalg.inv(eye + S)
    return [torch.block_diag(*blocks) for blocks in Q]


def permutation(d, b, i):
    """The matrix that gathers, in each super-block, the even groups first and then the odd ones."""
    groups = torch.arange(d).reshape(-1, 2 ** (i + 1), b // 2)
    order = torch.cat([groups[:, 0::2], groups[:, 1::2]], 1).flatten()
    return torch.eye(d, dtype=torch.float64)[order]


@given(data=st.data(), case=st.sampled_from(CASES))
def test_formula(data, case):
    layer = data.draw(layers(case, scrambled=True))
    R, s = layer.leaves["R"], layer.leaves["s"]
    W = layer.module.weight
    d, b = W.shape[1], W.shape[1] // R.shape[1]
    for i, block_diagonal in enumerate(rotations(R)):
        P = permutation(d, b, i) if i else torch.eye(d, dtype=torch.float64)
        W = W @ (P @ block_diagonal @ P.T).T
    torch.testing.assert_close(layer.weight(), s[:, None] * W)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_without_gains_it_is_a_rotation(case):
    layer = case.layer(d_in=2, d_out=5, scrambled=True)
    rotated = layer.with_leaves({"s": torch.ones_like(layer.leaves["s"])}).weight()
    W = layer.module.weight
    torch.testing.assert_close(rotated @ rotated.T, W @ W.T)


@pytest.mark.filterwarnings("ignore")  # PEFT finds no CUDA extension
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("b", [2, 4, 8])
def test_parity_with_peft(b, bias):
    """PEFT's R has both triangles, so its gradient is half of ours, with both signs."""

    def upper(R):
        rows, columns = torch.triu_indices(b, b, 1)
        return (R - R.mT)[..., rows, columns] / 2

    errors = parity_errors(
        lf.BOFT(block_size=b),
        peft.BOFTConfig(boft_block_size=b, target_modules=["0"]),
        lambda layer: {
            "R": (layer.boft_R["default"], upper),
            "s": (layer.boft_s["default"], torch.Tensor.flatten),
        },
        bias=bias,
        dtype=torch.float64,
        constants=lambda layer: {},
        spread=1.0,
        merges=True,
    )
    assert errors.pop("dR") == pytest.approx(1, rel=1e-9)
    assert all(error <= 1e-12 for error in errors.values()), errors


def test_only_one_factor_is_written_for_peft(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(TypeError, match="boft"):
        to_peft(lf.init(model, lf.BOFT(factors=2)), tmp_path, model=model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 1}, "block_size: got 1, expected an integer of at least 2"),
        ({"factors": 0}, "factors: got 0, expected an integer of at least 1"),
        ({"block_size": 3, "factors": 2}, "block_size: got 3; several factors need an even one"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.BOFT(**settings)


def test_refuses_a_width_that_the_last_factor_does_not_divide():
    with pytest.raises(ValueError, match="asks for a multiple of 16, and d_in is 24"):
        lf.init(nn.Sequential(nn.Linear(24, 4)), lf.BOFT(factors=3))
