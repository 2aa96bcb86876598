"""KaSA compared with its formula and with PEFT."""

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.peft import from_peft
from lora_func.testing import Case, layers
from lora_func.variants.kasa import auxiliary_loss
from tests.support.cases import WIDE_RANK_LESS
from tests.support.models import scramble
from tests.support.parity import relative

CASE = Case("kasa", lambda r: lf.KaSA(r=r, alpha=3.0), start="elsewhere", **WIDE_RANK_LESS)


@given(data=st.data())
def test_formula(data):
    layer = data.draw(layers(CASE, scrambled=True))
    p, W = layer.leaves, layer.module.weight
    trained = 3 / len(p["d"]) * p["B"] @ torch.diag(p["d"]) @ p["A"]
    torch.testing.assert_close(layer.weight(), W - p["_T_out"] @ p["_T_in"] + trained)


def test_the_smallest_singular_values_are_gone():
    layer = CASE.layer(d_in=9, d_out=7, r=3)
    S = torch.linalg.svdvals(layer.module.weight)
    torch.testing.assert_close(
        torch.linalg.svdvals(layer.weight()), torch.cat([S[:-3], torch.zeros(3)]).to(S)
    )


def test_a_sign_of_d_is_a_sign_of_b():
    layer = CASE.layer(d_in=5, d_out=6, r=2, scrambled=True)
    turned = {"d": -layer.leaves["d"], "B": -layer.leaves["B"]}
    torch.testing.assert_close(layer.apply(turned), layer.apply())


def test_a_rank_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"0: kasa: r = 3 leaves none of the 3 singular"):
        lf.init(nn.Sequential(nn.Linear(4, 3)), lf.KaSA(r=3))


def test_the_auxiliary_loss_is_pefts():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    config = peft.LoraConfig(r=2, kasa_config=peft.KasaConfig(beta=0.3, gamma=0.7))
    config.target_modules = {"0", "1"}
    theirs = peft.get_peft_model(model, config)
    params = {}
    for i in "01":
        layer = theirs.base_model.model[int(i)]
        own = {"A": layer.lora_A.default.weight, "B": layer.lora_B.default.weight}
        for leaf, tensor in {**own, "d": layer.lora_diag.default}.items():
            tensor.data.normal_()
            params[f"{i}.kasa.{leaf}"] = tensor
    expected = theirs.base_model._get_kasa_loss()
    torch.testing.assert_close(auxiliary_loss(params, 0.3, 0.7), expected)


def test_the_auxiliary_loss_of_a_stack_is_that_of_each():
    model = nn.Sequential(nn.Linear(6, 5))
    each = [scramble(lf.init(model, lf.KaSA(r=2)), seed=seed) for seed in range(3)]
    together = auxiliary_loss(lf.stack(each))
    torch.testing.assert_close(together, torch.stack([auxiliary_loss(one) for one in each]))
    with pytest.raises(ValueError, match="no site is adapted by KaSA"):
        auxiliary_loss(lf.init(model, lf.LoRA(r=2)))


@pytest.mark.parametrize("bias", [True, False])
def test_parity_with_peft(bias, tmp_path):
    """In float32, the precision in which PEFT truncates."""
    config = peft.LoraConfig(r=4, lora_alpha=6, kasa_config=peft.KasaConfig(), target_modules=["0"])
    model = nn.Sequential(nn.Linear(48, 64, bias=bias))
    theirs = nn.Sequential(nn.Linear(48, 64, bias=bias))
    theirs.load_state_dict(model.state_dict())
    theirs = peft.get_peft_model(theirs, config)
    layer = theirs.base_model.model[0]
    layer.lora_B.default.weight.data.normal_()
    theirs.save_pretrained(tmp_path)
    params = from_peft(tmp_path, model)
    x = torch.randn(2, 7, 48, requires_grad=True)
    y, their_y = lf.fcall(model, params, x), theirs(x)
    assert relative(y, their_y) < 1e-5
    leaves = [params[f"0.kasa.{leaf}"] for leaf in "ABd"]
    pairs = layer.lora_A.default.weight, layer.lora_B.default.weight, layer.lora_diag.default
    ours = torch.autograd.grad(y.square().sum(), [x, *leaves])
    expected = torch.autograd.grad(their_y.square().sum(), [x, *pairs])
    assert all(relative(a, b) < 1e-5 for a, b in zip(ours, expected, strict=True))
    layer.merge()
    merged = lf.merge(model, params)["0.weight"]
    assert relative(merged, layer.get_base_layer().weight) < 1e-5
