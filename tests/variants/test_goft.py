"""GOFT and qGOFT compared with the product of their rotations, one pair after another."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.testing import Case, layers
from lora_func.variants.goft import _block, orthogonality_penalty
from tests.support.models import scramble

SIZES = {"fit": lambda d_in, d_out, r: (3 * d_in + 1 if d_in % 2 else 4 * d_in, d_out, r)}


def levels(d_in):
    stride, live = 1, d_in
    while live > 1:
        yield [(2 * stride * j, 2 * stride * j + stride) for j in range(live // 2)]
        stride, live = 2 * stride, -(-live // 2)


def rotation(d_in, matrices):
    """The matrix that multiplies a row of inputs, from those of the pairs, finest level first."""
    R, found = torch.eye(d_in, dtype=matrices.dtype), iter(matrices)
    for level in levels(d_in):
        G = torch.eye(d_in, dtype=matrices.dtype)
        for p, q in level:
            G[torch.tensor([[p], [q]]), torch.tensor([p, q])] = next(found).mT
        R = G @ R  # the coarsest acts first on a row
    return R


def matrices_of(leaves):
    if "E" in leaves:
        return torch.eye(2) + leaves["E"].detach()
    angle = math.pi * leaves["angles"].detach().tanh()
    rows = angle.cos(), -angle.sin(), angle.sin(), angle.cos()
    return torch.stack(rows, -1).unflatten(-1, (2, 2))


@pytest.mark.parametrize("quasi", [False, True])
@given(data=st.data())
def test_formula(quasi, data):
    case = Case("goft", lambda r: lf.GOFT(quasi=quasi), **SIZES)
    layer = data.draw(layers(case, scrambled=True))
    W, p = layer.module.weight, layer.leaves
    gains = 1 + p["gains"] if "gains" in p else torch.ones(W.shape[1], dtype=W.dtype)
    R = rotation(W.shape[1], matrices_of(p))
    torch.testing.assert_close(layer.weight(), W * gains @ R.mT)
    torch.testing.assert_close(
        layer.apply(), nn.functional.linear(layer.x @ R * gains, W, layer.module.bias)
    )


@pytest.mark.parametrize("d_in", [2, 3, 16, 37, 48])
def test_the_tree_is_orthogonal(d_in):
    """The released code is not, from its second level on."""
    layer = nn.Linear(d_in, d_in, bias=False).double()
    nn.init.eye_(layer.weight)
    params = lf.init(layer, lf.GOFT(), dtype=torch.float64)
    params[".goft.angles"].data.normal_()
    R = lf.merge(layer, params)["weight"]
    torch.testing.assert_close(R @ R.mT, torch.eye(d_in).double())
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(()).double())


@pytest.mark.parametrize(
    ("d_in", "block"), [(2, 1), (16, 4), (37, 1), (48, 4), (768, 16), (4096, 64)]
)
def test_blocks_divide_the_width(d_in, block):
    assert _block(d_in) == block


def test_the_penalty_is_zero_for_rotations_alone():
    model = nn.Sequential(nn.Linear(8, 4))
    params = lf.init(model, lf.GOFT(quasi=True))
    assert orthogonality_penalty(params) == 0
    angle = torch.tensor(0.3)
    G = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    turned = {key: leaf.detach() + (G - torch.eye(2)) for key, leaf in params.items()}
    torch.testing.assert_close(orthogonality_penalty(turned), torch.zeros(()), atol=1e-10, rtol=0)
    each = [scramble(params, seed=seed) for seed in range(3)]
    together = orthogonality_penalty(lf.stack(each))
    torch.testing.assert_close(together, torch.stack([orthogonality_penalty(p) for p in each]))
    assert (together > 0).all()
    with pytest.raises(ValueError, match="no site is adapted by qGOFT"):
        orthogonality_penalty(lf.init(model, lf.GOFT()))


def test_one_input_is_refused():
    with pytest.raises(ValueError, match="0: goft: d_in = 1 has no pair"):
        lf.init(nn.Sequential(nn.Linear(1, 3)), lf.GOFT())
