"""PEANuT compared with its formula and with PEFT."""

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.peft import from_peft, to_peft
from lora_func.testing import Case, layers
from tests.support.models import scramble
from tests.support.parity import assert_parity, same

CASE = Case("peanut", lambda r: lf.PEANuT(r=r, scaling=2.0, depth=2))


@given(data=st.data())
def test_formula(data):
    layer = data.draw(layers(CASE, scrambled=True))
    p, W = layer.leaves, layer.module.weight
    first = torch.relu(W.mT @ p["A"].mT)
    second = torch.relu(first @ p["E"][0].mT)
    third = torch.relu(second @ p["E"][1].mT)
    h = torch.relu(third @ p["D"][0].mT) + second
    h = torch.relu(h @ p["D"][1].mT) + first
    torch.testing.assert_close(layer.weight(), W + 2 * (h @ p["B"].mT).mT)


def test_the_layer_is_linear():
    layer = CASE.layer(d_in=5, d_out=6, r=2, bias=False, scrambled=True)
    torch.testing.assert_close(layer.apply(x=3 * layer.x), 3 * layer.apply())


@pytest.mark.parametrize("field", [{"depth": -1}, {"scaling": float("nan")}, {"r": 0}])
def test_settings_are_checked(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        lf.PEANuT(**field)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parity_with_peft(bias, dtype):
    assert_parity(
        lf.PEANuT(r=4, scaling=1.5),
        peft.PeanutConfig(r=4, scaling=1.5, target_modules=["0"]),
        lambda layer: {
            "A": (layer.peanut_A["default"].weight, same),
            "B": (layer.peanut_B["default"].weight, same),
        },
        bias=bias,
        dtype=dtype,
    )


@pytest.mark.parametrize("depth", [1, 3])
def test_inner_layers_are_pefts(depth, tmp_path):
    torch.manual_seed(0)
    own, theirs = (nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5)).double() for _ in range(2))
    theirs.load_state_dict(own.state_dict())
    config = peft.PeanutConfig(r=4, depth=depth, target_modules=["0", "1"])
    theirs = peft.get_peft_model(theirs, config)
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data.normal_()
    theirs.save_pretrained(tmp_path)
    params = from_peft(tmp_path, own)
    x = torch.randn(3, 8, dtype=torch.float64)
    y, expected = lf.fcall(own, params, x), theirs(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for i in range(2):
        for leaf, name in (("E", "encoders"), ("D", "decoders")):
            layers = getattr(theirs.base_model.model[i], f"peanut_{name}")["default"]
            gradient = torch.stack([layer.weight.grad for layer in layers])
            torch.testing.assert_close(params[f"{i}.peanut.{leaf}"].grad, gradient)


@pytest.mark.parametrize("depth", [0, 2])
def test_peft_reads_it(depth, tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5)), torch.randn(3, 8)
    params = scramble(lf.init(model, lf.PEANuT(r=4, depth=depth)))
    to_peft(params, tmp_path, model=model)
    again = from_peft(tmp_path, model)
    assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in params.items()}
    expected = lf.fcall(model, params, x)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(theirs(x), expected, atol=1e-4, rtol=1e-4)


def test_other_activations_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(8, 6))
    config = peft.PeanutConfig(r=4, act_fn="gelu", target_modules=["0"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(lf.AdapterFileError, match="act_fn is 'gelu'"):
        from_peft(tmp_path, nn.Sequential(nn.Linear(8, 6)))
