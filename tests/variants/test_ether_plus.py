"""ETHER+ compared with its formula in dense matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.testing import Case, layers

CASES = [
    Case(
        f"ether-plus-{n}-{sides}",
        lambda r, n=n, two=sides == 2: lf.ETHERPlus(blocks=n, two_sided=two),
        fit=lambda d_in, d_out, r, n=n: (n * d_in, n * d_out, r),
    )
    for n, sides in ((1, 1), (3, 2))
]


def relaxed(u, v):
    """blockdiag(I + v̂ v̂ᵀ - û ûᵀ)."""
    u, v = (t / t.norm(dim=1, keepdim=True) for t in (u, v))
    eye = torch.eye(u.shape[1], dtype=u.dtype)
    return torch.block_diag(
        *(eye + torch.outer(b, b) - torch.outer(a, a) for a, b in zip(u, v, strict=True))
    )


@given(data=st.data(), case=st.sampled_from(CASES))
def test_formula(data, case):
    layer = data.draw(layers(case, scrambled=True))
    p, W = layer.leaves, layer.module.weight
    W = W @ relaxed(p["u"], p["v"])
    if "u_out" in p:
        W = relaxed(p["u_out"], p["v_out"]) @ W
    torch.testing.assert_close(layer.weight(), W)


def test_the_bias_is_not_transformed():
    layer = CASES[1].layer(scrambled=True, bias=True)
    torch.testing.assert_close(layer.apply(x=0 * layer.x)[0], layer.module.bias)


def test_the_change_is_bounded():
    layer = CASES[1].layer(d_in=4, d_out=3, scrambled=True)
    H = relaxed(layer.leaves["u"], layer.leaves["v"])
    singular = torch.linalg.svdvals(H)
    assert singular.max() <= 2
    blocks = (H - torch.eye(len(H), dtype=H.dtype)).unflatten(0, (3, -1)).norm(dim=(1, 2))
    assert (blocks <= 2**0.5 + 1e-9).all()


def test_the_first_gradients_of_both_directions_are_equal_and_at_right_angles_to_them():
    layer = CASES[1].layer(d_in=4, d_out=3)
    gradients = torch.func.grad(lambda leaves: layer.apply(leaves).square().sum())(layer.trained)
    torch.testing.assert_close(gradients["u"], gradients["v"])
    along = (gradients["u"] * layer.leaves["u"]).sum(-1)
    assert (along.abs() < 1e-10).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"blocks": 0}, "blocks: got 0"), ({"two_sided": 1}, "two_sided: got 1")],
)
def test_refuses(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lf.ETHERPlus(**settings)


def test_refuses_a_width_that_the_blocks_do_not_divide():
    model = nn.Sequential(nn.Linear(8, 6))
    with pytest.raises(ValueError, match="blocks = 4 does not divide d_out = 6"):
        lf.init(model, lf.ETHERPlus(blocks=4))
    lf.init(model, lf.ETHERPlus(blocks=4, two_sided=False))
