"""TinyLoRA compared with its formula and with PEFT, with one vector for each site and for all."""

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
from tests.support.parity import relative

CASE = Case("tinylora", lambda r: lf.TinyLoRA(r=r, u=3))


@given(data=st.data())
def test_formula(data):
    layer = data.draw(layers(CASE, scrambled=True))
    p, W = layer.leaves, layer.module.weight
    core = sum(v * P for v, P in zip(p["v"], p["_P"], strict=True))
    torch.testing.assert_close(layer.weight(), W + p["_B"] @ core @ p["_A"])


def test_factors_are_the_largest_singular_components():
    layer = CASE.layer(d_in=7, d_out=6, r=2)
    U, S, Vh = torch.linalg.svd(layer.module.weight, full_matrices=False)
    product = layer.leaves["_B"] @ layer.leaves["_A"]
    torch.testing.assert_close(product, U[:, :2] * S[:2] @ Vh[:2])


def model():
    torch.manual_seed(0)
    layers = nn.Linear(12, 16), nn.Linear(16, 8, bias=False), nn.Linear(8, 8)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("tying", [0.0, 1.0])
def test_parity_with_peft(tying, tmp_path):
    """Sites that are targeted out of order; the numbers of PEFT are those of the model."""
    targets = ["2", "0", "1"]
    config = peft.TinyLoraConfig(r=3, u=5, weight_tying=tying, target_modules=targets)
    theirs, own = peft.get_peft_model(model(), config), model()
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data.normal_()
    theirs.save_pretrained(tmp_path)
    params = from_peft(tmp_path, own)
    x = torch.randn(5, 12, requires_grad=True)
    y, expected = lf.fcall(own, params, x), theirs(x)
    assert relative(y, expected) < 1e-5
    names = ["*.tinylora_tied.v"] if tying else [f"{i}.tinylora.v" for i in range(3)]
    leaves = [params[name] for name in names]
    ours = torch.autograd.grad(y.square().sum(), [x, *leaves])
    others = torch.autograd.grad(expected.square().sum(), [x, *trained.values()])
    assert all(relative(a, b) < 1e-5 for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_peft_reads_it(tied, tmp_path):
    own, x = model(), torch.randn(5, 12)
    targets = [f"^{i}$" for i in (2, 0, 1)]
    params = scramble(lf.init(own, lf.TinyLoRA(r=3, u=5, tied=tied, target_modules=targets)))
    to_peft(params, tmp_path, model=own)
    expected = lf.fcall(own, params, x)
    again = from_peft(tmp_path, own)
    assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in params.items()}
    theirs = peft.PeftModel.from_pretrained(own, tmp_path)
    torch.testing.assert_close(theirs(x), expected, atol=1e-4, rtol=1e-4)


def test_groups_in_between_are_refused(tmp_path):
    config = peft.TinyLoraConfig(weight_tying=0.5, target_modules=["0", "1", "2"])
    peft.get_peft_model(model(), config).save_pretrained(tmp_path)
    with pytest.raises(lf.AdapterFileError, match=r"weight_tying is 0.5; .* only at"):
        from_peft(tmp_path, model())


def test_numbers_are_counted():
    with pytest.raises(ValueError, match="u: got 0, expected an integer of at least 1"):
        lf.TinyLoRA(u=0)
