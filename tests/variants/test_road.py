"""RoAd 1, 2 and 4 compared with their formula in dense matrices and with PEFT."""

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.testing import Case, layers
from tests.support.parity import assert_parity, same

CASES = {
    kind: Case(
        f"road{kind}",
        lambda r, kind=kind: lf.ROAD(kind=kind, group_size=4),
        fit=lambda d_in, d_out, r: (d_in, 4 * d_out, r),
    )
    for kind in (1, 2, 4)
}


def dense_rotation(leaves, kind, g=4):
    theta, alpha = leaves["theta"], leaves["alpha"]
    blocks = []
    for t, a in zip(theta, alpha, strict=True):
        cos, sin = a * t.cos(), a * t.sin()
        R = torch.zeros(g, g, dtype=t.dtype)
        for j in range(g):
            k, sign = (j + g // 2, -1) if j < g // 2 else (j - g // 2, 1)
            entry = j % (g // 2) if kind == 1 else j
            R[j, j] = cos[0, entry] if kind == 4 else cos[entry]
            R[j, k] = sign * (sin[1, entry] if kind == 4 else sin[entry])
        blocks.append(R)
    return torch.block_diag(*blocks)


@given(data=st.data(), kind=st.sampled_from([1, 2, 4]))
def test_formula(data, kind):
    layer = data.draw(layers(CASES[kind], scrambled=True))
    R = dense_rotation(layer.leaves, kind)
    torch.testing.assert_close(layer.apply(), layer.module(layer.x) @ R.T)
    if kind == 1:
        scales = layer.leaves["alpha"].repeat(1, 2).flatten()
        torch.testing.assert_close(R @ R.T, (scales**2).diag())


def test_groups_of_two_pair_neighbours_as_the_paper_does():
    layer = Case("road1", lambda r: lf.ROAD(group_size=2)).layer(d_out=4)
    turned = layer.apply({"theta": torch.full((2, 1), torch.pi / 2, dtype=torch.float64)})
    first, second, third, fourth = layer.module(layer.x).unbind(-1)
    torch.testing.assert_close(turned, torch.stack([-second, first, -fourth, third], -1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [1, 2, 4])
@pytest.mark.parametrize("group_size", [2, 16, 64])
def test_parity_with_peft(bias, kind, group_size):
    assert_parity(
        lf.ROAD(kind=kind, group_size=group_size),
        peft.RoadConfig(variant=f"road_{kind}", group_size=group_size, target_modules=["0"]),
        lambda layer: {
            "theta": (layer.road_theta["default"], same),
            "alpha": (layer.road_alpha["default"], same),
        },
        bias=bias,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": True}, "kind: got True, expected one of 1, 2, 4"),
        ({"kind": 3}, "kind: got 3, expected one of 1, 2, 4"),
        ({"group_size": 3}, "group_size: got 3, expected an even number"),
        ({"group_size": 0}, "group_size: got 0, expected an integer of at least 2"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.ROAD(**settings)


def test_refuses_groups_that_do_not_fit():
    with pytest.raises(ValueError, match="0: road1: group_size = 64 does not divide d_out = 6"):
        lf.init(nn.Sequential(nn.Linear(4, 6)), lf.ROAD())


def test_the_config_tells_the_variants_apart():
    model = nn.Sequential(nn.Linear(4, 4))
    for kind in (1, 2, 4):
        (key, *_) = lf.init(model, lf.ROAD(kind=kind, group_size=4))
        assert key == f"0.road{kind}.theta"
