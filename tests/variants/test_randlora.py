"""RandLoRA compared with its formula and with PEFT."""

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

CASE = Case("randlora", lambda r: lf.RandLoRA(r=r, alpha=3.0))


@given(data=st.data())
def test_formula(data):
    """The sum over terms, with the pairs in PEFT's order."""
    layer = data.draw(layers(CASE, scrambled=True))
    p, W = layer.leaves, layer.module.weight
    (r, terms), low = p["lambda"].shape, min(W.shape)
    change = torch.zeros(max(W.shape), low, dtype=W.dtype)
    for t in range(r * terms):
        row = p["lambda"][t // terms, t % terms] * p["_A"][t // terms, 0, :low]
        column = p["_B"][: max(W.shape), t // r, t % r]
        change = change + 3 / r * torch.outer(column, row * p["gamma"][t % terms])
    torch.testing.assert_close(
        layer.weight(), W + (change if W.shape[0] >= W.shape[1] else change.mT)
    )


def test_the_change_has_full_rank():
    layer = CASE.layer(d_in=9, d_out=7, r=2, scrambled=True)
    assert torch.linalg.matrix_rank(layer.weight() - layer.module.weight) == 7


@pytest.mark.parametrize("rows", [1, 40])
def test_few_and_many_rows_give_the_same(rows):
    layer = CASE.layer(d_in=12, d_out=9, r=2, scrambled=True)
    x = torch.randn(rows, 12, dtype=layer.x.dtype)
    expected = torch.nn.functional.linear(x, layer.weight(), layer.module.bias)
    torch.testing.assert_close(layer.apply(x=x), expected)


@pytest.mark.parametrize(
    ("bases", "zeros"), [("dense", 0.0), ("sparse", 2 / 3), ("very_sparse", 1 - 60**-0.5)]
)
def test_bases_are_drawn_as_pefts(bases, zeros):
    model = nn.Sequential(nn.Linear(60, 80), nn.Linear(80, 70))
    params = lf.init(model, lf.RandLoRA(r=5, bases=bases))
    A, B = params["*.randlora._A"], params["*.randlora._B"]
    assert A.shape == (5, 1, 80)
    assert B.shape == (80, 16, 5)
    torch.testing.assert_close(B.std(), torch.tensor(1.0))
    assert abs((B == 0).float().mean() - zeros) < 0.05
    assert B.abs().max() < (1.8 if bases == "dense" else 4)


def test_ranks_of_single_sites_are_refused():
    with pytest.raises(ValueError, match="rank_pattern: the sites of RandLoRA share"):
        lf.RandLoRA(rank_pattern={"0": 3})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parity_with_peft(dtype, tmp_path):
    """Three layers of different shapes share the bases."""

    def model():
        torch.manual_seed(0)
        layers = nn.Linear(24, 32), nn.Linear(32, 16, bias=False), nn.Linear(16, 16)
        return nn.Sequential(*layers).to(dtype)

    config = peft.RandLoraConfig(r=4, randlora_alpha=6, target_modules=["0", "1", "2"])
    theirs, own = peft.get_peft_model(model(), config), model()
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data.normal_()
    theirs.save_pretrained(tmp_path)
    params = from_peft(tmp_path, own)
    x = torch.randn(5, 24, dtype=dtype, requires_grad=True)
    y, expected = lf.fcall(own, params, x), theirs(x)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    assert relative(y, expected) < limit
    leaves = [params[f"{i}.randlora.{leaf}"] for leaf in ("lambda", "gamma") for i in range(3)]
    pairs = [
        trained[f"base_model.model.{i}.randlora_{leaf}.default"]
        for leaf in ("lambda", "gamma")
        for i in range(3)
    ]
    ours = torch.autograd.grad(y.square().sum(), [x, *leaves])
    others = torch.autograd.grad(expected.square().sum(), [x, *pairs])
    assert all(relative(a, b) < limit for a, b in zip(ours, others, strict=True))


def test_peft_reads_it(tmp_path):
    """PEFT misses the copies of the bases that it writes at each module, and needs none."""
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 16))
    params, x = scramble(lf.init(model, lf.RandLoRA(r=4))), torch.randn(5, 24)
    to_peft(params, tmp_path, model=model)
    expected = lf.fcall(model, params, x)
    with pytest.warns(UserWarning, match="missing adapter keys .*0.randlora_A"):
        theirs = peft.PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(theirs(x), expected, atol=1e-4, rtol=1e-4)
