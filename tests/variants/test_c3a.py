"""C3A compared with circulant matrices and with PEFT, whose gradient of x is wrong."""

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lora_func as lf
from lora_func.testing import Case, layers
from tests.support.parity import assert_parity, parity_errors, same

CASES = [
    Case(
        f"c3a-{b}",
        lambda r, b=b: lf.C3A(block_size=b),
        fit=lambda d_in, d_out, r, b=b: (b * d_in, b * d_out, r),
    )
    for b in (1, 4, 5)
]


def circulant(kernel):
    """Each row is the row above it, rolled by one."""
    return torch.stack([kernel.roll(k) for k in range(len(kernel))])


@given(data=st.data(), case=st.sampled_from(CASES))
def test_formula(data, case):
    layer = data.draw(layers(case, scrambled=True))
    kernel, W = layer.leaves["kernel"], layer.module.weight
    rows = [torch.cat([circulant(one) for one in row], 1) for row in kernel]
    change = torch.cat(rows) / W.shape[1]
    torch.testing.assert_close(layer.weight(), W + change)
    torch.testing.assert_close(layer.variant.delta_norm(layer.leaves, None), change.norm())


def test_it_commutes_with_rolling_every_block():
    layer = CASES[1].layer(d_in=3, d_out=2, scrambled=True, bias=False)
    rolled = layer.x.unflatten(-1, (-1, 4)).roll(1, -1).flatten(-2)
    change = layer.apply() - layer.frozen()
    of_rolled = layer.apply(x=rolled) - layer.module(rolled)
    torch.testing.assert_close(of_rolled, change.unflatten(-1, (-1, 4)).roll(1, -1).flatten(-2))


def link(layer):
    return {"kernel": (layer.c3a_kernel["default"], same)}


def parity(b, bias, dtype):
    theirs = peft.C3AConfig(block_size=b, target_modules=["0"])
    return parity_errors(
        lf.C3A(block_size=b),
        theirs,
        link,
        bias=bias,
        dtype=dtype,
        constants=lambda layer: {},
        spread=1.0,
        merges=True,
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("b", [2, 8, 16])
def test_parity_with_peft_except_the_gradient_of_x(b, bias):
    """PEFT computes in float32."""
    errors = parity(b, bias, torch.float32)
    assert errors.pop("dx") > (0.05 if b > 2 else -1)
    assert all(error <= 1e-5 for error in errors.values()), errors


def test_a_block_of_two_has_the_right_gradient_in_peft_too():
    assert_parity(
        lf.C3A(block_size=2),
        peft.C3AConfig(block_size=2, target_modules=["0"]),
        link,
        dtype=torch.float32,
    )


def test_the_start_of_the_authors_changes_the_model():
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.randn(3, 8)
    drawn = lf.init(model, lf.C3A(block_size=4, start="xavier_uniform"))
    assert drawn["0.c3a.kernel"].abs().max() <= (6 / 12) ** 0.5
    assert not torch.equal(lf.fcall(model, drawn, x), model(x))


def test_refuses():
    with pytest.raises(ValueError, match="block_size = 3 does not divide d_in = 6 and d_out = 4"):
        lf.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), lf.C3A(block_size=3))
    with pytest.raises(ValueError, match="start: got 'gaussian'"):
        lf.C3A(start="gaussian")
