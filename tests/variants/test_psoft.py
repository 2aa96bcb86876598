"""PSOFT compared with its formula in dense matrices and with PEFT."""

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn

import lora_func as lf
from lora_func.numerics import skew
from lora_func.peft import from_peft, to_peft
from lora_func.testing import Case, layers
from tests.support.models import scramble
from tests.support.parity import assert_parity, same

CASES = [
    Case(
        f"psoft-{gains}",
        lambda r, gains=gains: lf.PSOFT(r=r, gains=gains),
        fit=lambda d_in, d_out, r: (d_in + 1, d_out + 1, r + 1),
    )
    for gains in (True, False)
]


def core(p):
    K = skew(p["K"])
    eye = torch.eye(len(K), dtype=K.dtype)
    R = (eye + K) @ torch.linalg.inv(eye - K)
    return p["b"][:, None] * R * p["a"] if "a" in p else R


@given(data=st.data(), case=st.sampled_from(CASES))
def test_formula(data, case):
    layer = data.draw(layers(case, scrambled=True))
    p, W = layer.leaves, layer.module.weight
    R = core(p)
    change = p["_B"] @ (R - torch.eye(len(R), dtype=R.dtype)) @ p["_A"]
    torch.testing.assert_close(layer.weight(), W + change)


def test_a_rotation_keeps_the_singular_values():
    layer = CASES[1].layer(d_in=7, d_out=6, r=3, scrambled=True)
    ours, frozen = (torch.linalg.svdvals(w) for w in (layer.weight(), layer.module.weight))
    torch.testing.assert_close(ours, frozen)


@pytest.mark.parametrize("gains", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_parity_with_peft(gains, bias):
    """In float32, the precision of PEFT's SVD."""

    def link(layer):
        R = layer.psoft_R["default"]
        linked = {"K": R.weight} | ({"a": R.vector_a, "b": R.vector_b} if gains else {})
        return {leaf: (parameter, same) for leaf, parameter in linked.items()}

    assert_parity(
        lf.PSOFT(r=6, gains=gains),
        peft.PsoftConfig(
            r=6, psoft_alpha=6, psoft_mag_a=gains, psoft_mag_b=gains, target_modules=["0"]
        ),
        link,
        bias=bias,
        dtype=torch.float32,
        constants=lambda layer: {
            "_A": layer._psoft_A_cache["default"],
            "_B": layer._psoft_B_cache["default"],
        },
        spread=0.3,
    )


@pytest.mark.parametrize("gains", [True, False])
def test_checkpoints_of_peft_are_read_and_loras_are_written(gains, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 10)), torch.randn(3, 12)
    config = peft.PsoftConfig(
        r=4, psoft_alpha=8, psoft_mag_a=gains, psoft_mag_b=gains, target_modules=["0"]
    )
    theirs = peft.get_peft_model(nn.Sequential(model[0]), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    expected = theirs(x)
    theirs.save_pretrained(tmp_path / "psoft")
    params = from_peft(tmp_path / "psoft", model)
    torch.testing.assert_close(lf.fcall(model, params, x), expected, rtol=1e-4, atol=1e-5)
    scramble(params)
    to_peft(params, tmp_path / "lora", model=model)
    loaded = PeftModel.from_pretrained(nn.Sequential(model[0]), tmp_path / "lora")
    torch.testing.assert_close(loaded(x), lf.fcall(model, params, x), rtol=1e-4, atol=1e-5)


def test_refuses():
    with pytest.raises(ValueError, match="r: got 1, expected at least 2"):
        lf.PSOFT(r=1)
    with pytest.raises(TypeError, match="gains: got 1"):
        lf.PSOFT(gains=1)


@pytest.mark.parametrize("start", ["psoft_init", "pissa_init"])
def test_both_starts_of_peft_are_read(start, tmp_path):
    model = nn.Sequential(nn.Linear(8, 6))
    theirs = nn.Sequential(nn.Linear(8, 6))
    theirs.load_state_dict(model.state_dict())
    config = peft.PsoftConfig(r=3, psoft_alpha=6, ab_svd_init=start, target_modules=["0"])
    theirs = peft.get_peft_model(theirs, config)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    theirs.save_pretrained(tmp_path)
    params, x = from_peft(tmp_path, model), torch.randn(4, 8)
    torch.testing.assert_close(lf.fcall(model, params, x), theirs(x), atol=1e-5, rtol=1e-5)
