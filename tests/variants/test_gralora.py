"""GraLoRA compared with its formula block by block and with PEFT."""

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lora_func as lf
from lora_func.testing import Case, layers
from tests.support.parity import assert_parity, same

CASES = [
    Case(
        f"gralora-{k}",
        lambda r, k=k, h=hybrid: lf.GraLoRA(r=k * r, k=k, hybrid_r=h, alpha=3.0),
        fit=lambda d_in, d_out, r, k=k: (k * d_in, k * d_out, r),
    )
    for k, hybrid in ((1, 0), (2, 1), (3, 0))
]


def change(p):
    A, B = p["A"], p["B"]
    k, r = len(A), A.shape[-1]
    rho = r // k
    rows = [
        torch.cat(
            [
                B[j, i * rho : (i + 1) * rho].T @ A[i, :, j * rho : (j + 1) * rho].T
                for i in range(k)
            ],
            1,
        )
        for j in range(k)
    ]
    whole = torch.cat(rows)
    if "A_general" in p:
        whole = whole + p["B_general"] @ p["A_general"]
    return p["_scale"] * whole


@given(data=st.data(), case=st.sampled_from(CASES))
def test_formula(data, case):
    layer = data.draw(layers(case, scrambled=True))
    torch.testing.assert_close(layer.weight(), layer.module.weight + change(layer.leaves))


def test_one_block_is_a_lora():
    layer = CASES[0].layer(d_in=6, d_out=5, r=2, scrambled=True)
    p = layer.leaves
    lora = Case("lora", lambda r: lf.LoRA(r=r, alpha=3.0)).layer(d_in=6, d_out=5, r=2)
    torch.testing.assert_close(lora.apply({"A": p["A"][0].T, "B": p["B"][0].T}), layer.apply())


def test_the_rank_of_the_change_is_k_times_r():
    layer = Case("gralora", lambda r: lf.GraLoRA(r=4, k=2)).layer(d_in=12, d_out=10, scrambled=True)
    assert torch.linalg.matrix_rank(change(layer.leaves)) == 8


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "settings",
    [{"r": 4, "k": 2}, {"r": 8, "k": 4, "alpha": 4}, {"r": 4, "k": 2, "hybrid_r": 3, "alpha": 7}],
)
def test_parity_with_peft(settings, bias, dtype):
    theirs = {name: value for name, value in settings.items() if name != "k"}
    theirs |= {"gralora_k": settings["k"]} | {"alpha": settings.get("alpha", 2 * settings["r"])}

    def link(layer):
        linked = {"A": layer.gralora_A["default"], "B": layer.gralora_B["default"]}
        if settings.get("hybrid_r"):
            linked["A_general"] = layer.gralora_A_general["default"].weight
            linked["B_general"] = layer.gralora_B_general["default"].weight
        return {leaf: (parameter, same) for leaf, parameter in linked.items()}

    assert_parity(
        lf.GraLoRA(**settings),
        peft.GraloraConfig(target_modules=["0"], **theirs),
        link,
        bias=bias,
        dtype=dtype,
    )


@pytest.mark.parametrize("settings", [{"r": 3}, {"r": 4, "k": 4}, {"r": 5, "k": 5}])
def test_refuses_what_k_does_not_divide(settings):
    with pytest.raises(ValueError, match=r"k = \d does not divide (r|d_in|d_out) = \d"):
        lf.init(torch.nn.Sequential(torch.nn.Linear(6, 10)), lf.GraLoRA(**settings))


def test_alpha_is_divided_by_both_ranks():
    assert lf.GraLoRA(r=6, hybrid_r=2, alpha=4).scale == 0.5
    assert lf.GraLoRA(r=6, hybrid_r=2).scale == 2
