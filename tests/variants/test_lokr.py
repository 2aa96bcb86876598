"""LoKr compared with the Kronecker product and with PEFT."""

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lora_func as lf
from lora_func.numerics import two_divisors
from lora_func.testing import Case, layers
from tests.support.parity import assert_parity, same

CASES = [
    Case("lokr", lambda r: lf.LoKr(r=r, alpha=3.0)),
    Case("lokr-both", lambda r: lf.LoKr(r=1, decompose_both=True, zero="w2")),
]


def whole(leaves, name):
    return leaves[name] if name in leaves else leaves[f"{name}_a"] @ leaves[f"{name}_b"]


@given(data=st.data(), case=st.sampled_from(CASES))
def test_formula(data, case):
    layer = data.draw(layers(case, scrambled=True))
    p = layer.leaves
    change = p["_scale"] * torch.kron(whole(p, "w1"), whole(p, "w2"))
    torch.testing.assert_close(layer.weight(), layer.module.weight + change)
    torch.testing.assert_close(layer.variant.delta_norm(p, None), change.norm().double())


@pytest.mark.parametrize(
    ("d", "factor", "expected"),
    [
        (768, None, (24, 32)),
        (1024, None, (32, 32)),
        (2304, None, (48, 48)),
        (4096, None, (64, 64)),
        (11008, None, (86, 128)),
        (127, None, (1, 127)),
        (768, 4, (4, 192)),
        (768, 5, (4, 192)),
        (768, 16, (16, 48)),
        (12, 6, (6, 2)),
    ],
)
def test_widths_are_split_as_in_lycoris(d, factor, expected):
    assert two_divisors(d, factor) == expected
    assert peft.tuners.lokr.layer.factorization(d, factor or -1) == expected


SETTINGS = {
    "split": {"r": 2},
    "whole": {"r": 8},
    "both": {"r": 2, "decompose_both": True},
    "factor": {"r": 4, "decompose_factor": 4, "alpha": 3},
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", SETTINGS)
def test_parity_with_peft(kind, bias, dtype):
    settings = SETTINGS[kind]

    def link(layer):
        names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
        stored = {name: getattr(layer, f"lokr_{name}") for name in names}
        return {n: (own["default"], same) for n, own in stored.items() if "default" in own}

    theirs = {"alpha": settings["r"]} | settings
    cfg, config = lf.LoKr(**settings), peft.LoKrConfig(target_modules=["0"], **theirs)
    assert_parity(cfg, config, link, bias=bias, dtype=dtype)


@pytest.mark.parametrize("zero", ["w1", "w2"])
def test_either_factor_starts_at_zero(zero):
    layer = Case("lokr", lambda r: lf.LoKr(r=8, zero=zero)).layer(d_in=12, d_out=8)
    other = "w2" if zero == "w1" else "w1"
    assert not layer.leaves[zero].any()
    assert layer.leaves[other].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decompose_factor": 0}, "decompose_factor: got 0, expected an integer of at least 1"),
        ({"zero": "w3"}, "zero: got 'w3', expected one of 'w1', 'w2'"),
        ({"decompose_both": 1}, "decompose_both: got 1"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lf.LoKr(**settings)
