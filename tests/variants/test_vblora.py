"""VB-LoRA compared with its formula and with PEFT; its bank is one leaf of all sites."""

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.peft import from_peft, to_peft
from lora_func.testing import Case, layers
from tests.support.cases import TWICE
from tests.support.models import scramble

CASE = Case(
    "vblora", lambda r: lf.VBLoRA(r=r, num_vectors=4, vector_length=2), start="elsewhere", **TWICE
)


def mixed(logits, bank):
    return sum(weight * bank[i] for weight, i in zip(*best_two(logits), strict=True))


def best_two(logits):
    top = logits.topk(2)
    return top.values.softmax(0), top.indices


@given(data=st.data())
def test_formula(data):
    layer = data.draw(layers(CASE, scrambled=True))
    p, W = layer.leaves, layer.module.weight
    bank = p["bank"]
    A = torch.stack([torch.cat([mixed(one, bank) for one in row]) for row in p["logits_A"]])
    columns = p["logits_B"].transpose(0, 1)
    B = torch.stack([torch.cat([mixed(one, bank) for one in column]) for column in columns], 1)
    torch.testing.assert_close(layer.weight(), W + B @ A)


def test_one_number_more_for_all_logits_of_a_piece_changes_nothing():
    layer = CASE.layer(d_in=3, d_out=2, r=2, scrambled=True)
    more = {
        "logits_A": layer.leaves["logits_A"]
        + torch.randn(*layer.leaves["logits_A"].shape[:2], 1).double()
    }
    torch.testing.assert_close(layer.apply(more), layer.apply())


def test_the_banks_gradient_is_the_sum_over_sites():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)).double()
    cfg = lf.VBLoRA(r=2, num_vectors=5, vector_length=2)
    params = scramble(lf.init(model, cfg, dtype=torch.float64))
    x = torch.randn(3, 4).double()

    def loss(first, second):
        h = x
        for module, site, bank in zip(model, "01", (first, second), strict=True):
            at = {k[1:]: v.detach() for k, v in params.items() if k.startswith(f"{site}.")}
            h = lf.fcall(module, {**at, "*.vblora.bank": bank}, h)
        return h.square().sum()

    bank = params["*.vblora.bank"].detach()
    first, second = torch.func.grad(loss, argnums=(0, 1))(bank, bank)
    lf.fcall(model, params, x).square().sum().backward()
    torch.testing.assert_close(params["*.vblora.bank"].grad, first + second)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((5, 4), "vector_length: 2 does not divide d_in = 5"), ((4, 5), "divide d_out = 5")],
)
def test_lengths_must_divide(shape, message):
    with pytest.raises(ValueError, match=message):
        lf.init(nn.Linear(*shape), lf.VBLoRA(vector_length=2))


def test_settings_are_checked():
    with pytest.raises(ValueError, match="topk: got 5, the bank has 4 vectors"):
        lf.VBLoRA(num_vectors=4, topk=5)
    with pytest.raises(ValueError, match="bound"):
        lf.VBLoRA(bound=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parity_with_peft(dtype, tmp_path):
    """Two layers share the bank, which the comparison of single layers cannot hold."""
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8)).to(dtype)
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8)).to(dtype),
        peft.VBLoRAConfig(r=3, num_vectors=7, vector_length=4, target_modules=["0", "1"]),
    )
    theirs.base_model.model.load_state_dict(
        {
            name.replace(".", ".base_layer.", 1): tensor
            for name, tensor in model.state_dict().items()
        },
        strict=False,
    )
    for name, parameter in theirs.named_parameters():
        if "vblora" in name:
            parameter.data.copy_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    params = from_peft(tmp_path, model)
    x = torch.randn(5, 12, dtype=dtype)
    ours, expected = lf.fcall(model, params, x), theirs(x)
    torch.testing.assert_close(ours, expected)
    ours.square().sum().backward()
    expected.square().sum().backward()
    bank = theirs.base_model.vblora_vector_bank["default"]
    torch.testing.assert_close(params["*.vblora.bank"].grad, bank.grad)


def test_stored_choices_are_refused(tmp_path):
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(12, 16)),
        peft.VBLoRAConfig(vector_length=4, save_only_topk_weights=True, target_modules=["0"]),
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(lf.AdapterFileError, match="save_only_topk_weights is True"):
        from_peft(tmp_path, nn.Sequential(nn.Linear(12, 16)))


def test_round_trip(tmp_path):
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    params = scramble(lf.init(model, lf.VBLoRA(r=2, num_vectors=5, vector_length=2)))
    to_peft(params, tmp_path, model=model)
    read = from_peft(tmp_path, model)
    assert {key: leaf.tolist() for key, leaf in read.items()} == {
        key: leaf.tolist() for key, leaf in params.items()
    }
