"""DeFT and PaRa compared with their formulas in dense matrices and with PEFT."""

from dataclasses import replace

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.testing import Case, layers
from tests.support.parity import assert_parity, same

CASES = [
    Case(
        f"{'para' if para else 'deft'}-{method}",
        lambda r, m=method, p=para: lf.DeFT(r=r, method=m, para=p, alpha=None if p else 3.0),
    )
    for method in ("relu", "qr")
    for para in (False, True)
]


def without_start(layer):
    """The layer as a checkpoint of PEFT gives it."""
    own = {name: leaf for name, leaf in layer.leaves.items() if name[-1] != "0"}
    return replace(layer, leaves=own)


@given(data=st.data(), case=st.sampled_from(CASES))
def test_formula(data, case):
    layer = data.draw(layers(case, scrambled=True))
    p, W = layer.leaves, layer.module.weight
    if case.name.endswith("relu"):
        Q, removed = p["P"], p["P"].relu()
    else:
        Q = removed = torch.linalg.qr(p["P"]).Q
    change = -Q @ removed.T @ W
    if "R" in p:
        change = change + p["_scale"] * Q @ p["R"]
    torch.testing.assert_close(layer.weight(), W + change)
    torch.testing.assert_close(without_start(layer).weight(), W + change)


def test_para_with_qr_removes_r_directions_of_the_outputs():
    layer = CASES[3].layer(d_in=8, d_out=7, r=3, scrambled=True)
    assert torch.linalg.matrix_rank(layer.weight()) == 4
    Q = torch.linalg.qr(layer.leaves["P"]).Q
    assert (Q.T @ layer.weight()).abs().max() < 1e-12


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ["relu", "qr"])
@pytest.mark.parametrize("settings", [{}, {"alpha": 6}, {"para": True}], ids=str)
def test_parity_with_peft(method, settings, bias):
    """In float32, in which PEFT merges."""

    def link(layer):
        linked = {"P": (layer.deft_P["default"], same)}
        if not settings.get("para"):
            linked["R"] = (layer.deft_R["default"], same)
        return linked

    assert_parity(
        lf.DeFT(r=4, method=method, **settings),
        peft.DeftConfig(r=4, decomposition_method=method, target_modules=["0"], **settings),
        link,
        bias=bias,
        dtype=torch.float32,
        spread=0.3,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "svd"}, "method: got 'svd', expected one of 'relu', 'qr'"),
        ({"para": True, "alpha": 2.0}, "para: PaRa injects nothing"),
        ({"para": True, "dropout": 0.1}, "para: PaRa injects nothing"),
        ({"para": 1}, "para: got 1"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lf.DeFT(**settings)


def test_refuses_a_rank_above_the_outputs():
    with pytest.raises(ValueError, match="r = 8 exceeds d_out = 6"):
        lf.init(nn.Sequential(nn.Linear(9, 6)), lf.DeFT(r=8))
