"""SSVD compared with its formula in dense matrices and with PEFT's PSOFT."""

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.testing import Case, layers
from lora_func.variants import ssvd
from tests.support.parity import assert_parity


def case(orthogonality):
    return Case("ssvd", lambda r: lf.SSVD(r=r, orthogonality=orthogonality))


def skew(upper, k):
    K = torch.zeros(k, k, dtype=upper.dtype)
    K[tuple(torch.triu_indices(k, k, 1))] = upper
    return K - K.T


@given(data=st.data(), orthogonality=st.sampled_from(["approx", "strict"]))
def test_formula(data, orthogonality):
    layer = data.draw(layers(case(orthogonality), scrambled=True))
    p, k = layer.leaves, len(layer.leaves["delta_s"])
    eye = torch.eye(k, dtype=torch.float64)
    if orthogonality == "approx":
        K = skew(p["K"], k)
        G = eye - 2 * K
        torch.testing.assert_close(G @ G.T, eye + 4 * K @ K.T)
    else:
        K = skew(p["K_strict"], k)
        G = (eye - K) @ torch.linalg.inv(eye + K)
        torch.testing.assert_close(G @ G.T, eye)
    U, S, Vh = torch.linalg.svd(layer.module.weight, full_matrices=False)
    rest = (U[:, k:] * S[k:]) @ Vh[k:]
    S = (p["_S"] + p["delta_s"]).diag()
    W = p["_U"] @ S @ G @ p["_Vh"] + rest
    torch.testing.assert_close(layer.apply(), F.linear(layer.x, W, layer.module.bias))


@pytest.mark.parametrize("bias", [True, False])
def test_parity_with_psoft(bias):
    """In float32, the precision of PSOFT's SVD; PSOFT has no δ."""

    def constants(layer):
        B, A = layer._psoft_B_cache["default"], layer._psoft_A_cache["default"]
        S = B.norm(dim=0)
        return {"_U": B / S, "_S": S, "_Vh": A, "delta_s": torch.zeros(6)}

    assert_parity(
        lf.SSVD(r=6, orthogonality="strict"),
        peft.PsoftConfig(
            r=6, psoft_alpha=6, psoft_mag_a=False, psoft_mag_b=False, target_modules=["0"]
        ),
        lambda layer: {"K_strict": (layer.psoft_R["default"].weight, torch.neg)},
        bias=bias,
        dtype=torch.float32,
        constants=constants,
        spread=0.3,
    )


def test_ratio():
    model = nn.Sequential(nn.Linear(120, 100))
    params = lf.init(model, lf.SSVD(rotation_ratio=0.29))
    assert params["0.ssvd.delta_s"].shape == (29,)
    assert params["0.ssvd.K"].shape == (29 * 14,)


def test_one_direction_has_no_rotation():
    layer = case("strict").layer(r=1, scrambled=True)
    assert layer.leaves["K_strict"].shape == (0,)
    assert ssvd.rotation(layer.leaves).item() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "r: got None, rotation_ratio: got None; give one of them"),
        ({"r": 2, "rotation_ratio": 0.5}, r"r: got 2, rotation_ratio: got 0\.5; give one"),
        ({"r": 0}, "r: got 0, expected an integer of at least 1"),
        ({"rotation_ratio": 0.0}, r"rotation_ratio: got 0\.0, expected a finite number above 0"),
        ({"rotation_ratio": 1.5}, r"rotation_ratio: got 1\.5, expected at most 1"),
        ({"r": 2, "orthogonality": "none"}, "orthogonality: got 'none', expected one of 'approx'"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.SSVD(**settings)


def test_refuses_at_init():
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="0: ssvd: r = 4 exceeds"):
        lf.init(model, lf.SSVD(r=4))
    with pytest.raises(ValueError, match=r"0: ssvd: rotation_ratio = 0\.1 of .* = 3 leaves no"):
        lf.init(model, lf.SSVD(rotation_ratio=0.1))
