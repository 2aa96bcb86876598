"""LoftQ against bitsandbytes' rounding and the published algorithm."""

import bitsandbytes.functional as bnb
import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import nn
from transformers import GPT2Config, GPT2Model

import lora_func as lf
from tests.support.parity import relative


def by_bitsandbytes(W):
    codes, state = bnb.quantize_4bit(W.contiguous(), quant_type="nf4", blocksize=64)
    return bnb.dequantize_4bit(codes, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 128), (3, 50), (1, 1)])
def test_nf4_is_that_of_bitsandbytes(shape, dtype):
    W = torch.randn(shape).to(dtype)
    assert torch.equal(lf.nf4(W), by_bitsandbytes(W))
    assert torch.equal(lf.nf4(lf.nf4(W)), lf.nf4(W))


def test_nf4_of_zeros_is_zero():
    assert torch.equal(lf.nf4(torch.zeros(2, 64)), torch.zeros(2, 64))


def reference(W, r, iters):
    """The loop of PEFT's ``loftq_init``, which itself runs on a GPU alone."""
    residual = W
    for _ in range(iters):
        Q = by_bitsandbytes(residual)
        found = _low_rank_decomposition(W - Q, r)
        residual = W - found["L"] @ found["R"]
    return Q, found["L"] @ found["R"]


@pytest.mark.parametrize("iters", [1, 3])
@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_parity_with_peft(iters, alpha):
    model = nn.Sequential(nn.Linear(128, 96)).requires_grad_(False)
    weights, params = lf.loftq(model, lf.LoRA(r=4, alpha=alpha), iters=iters)
    Q, LR = reference(model[0].weight, 4, iters)
    # the two SVDs round differently, which moves a few entries to the next of the 16 values
    apart = (weights["0.weight"] - Q).abs() > (1e-5 if iters > 1 else 0)
    assert apart.float().mean() < (0.005 if iters > 1 else 1e-9)
    change = alpha / 4 * params["0.lora.B"] @ params["0.lora.A"]
    assert relative(change, LR) < (0.1 if iters > 1 else 1e-4)


def test_the_error_falls_with_the_rounds():
    model = nn.Sequential(nn.Linear(256, 256)).requires_grad_(False)
    W = model[0].weight
    errors = [(W - lf.nf4(W)).norm()]
    for iters in (1, 2, 5):
        weights, params = lf.loftq(model, lf.LoRA(r=16), iters=iters)
        change = 2 * params["0.lora.B"] @ params["0.lora.A"]
        errors.append((W - weights["0.weight"] - change).norm())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.85 * errors[0]


@pytest.mark.parametrize("iters", [1, 3])
def test_the_adapter_belongs_to_the_quantised_model(iters):
    """Quantising the weights that come back finds the same values again."""
    model = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    x, y = torch.randn(5, 64), None
    y = model(x)
    weights, params = lf.loftq(model, lf.LoRA(r=8), iters=iters)
    model.load_state_dict(weights, strict=False)
    quantised = nn.Sequential(nn.Linear(64, 32))
    quantised.load_state_dict(model.state_dict())
    quantised[0].weight.data = by_bitsandbytes(quantised[0].weight)
    assert torch.equal(quantised[0].weight, model[0].weight)
    assert (lf.fcall(quantised, params, x) - y).norm() < (quantised(x) - y).norm()
    assert all(params[f"0.lora.{leaf}"].requires_grad for leaf in "AB")


def test_transposed_weights_come_back_as_they_are_stored():
    model = GPT2Model(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=9)).eval()
    cfg = lf.LoRA(r=4, target_modules="c_attn")
    weights, _ = lf.loftq(model, cfg)
    W = model.h[0].attn.c_attn.weight
    assert torch.equal(weights["h.0.attn.c_attn.weight"], lf.nf4(W.mT.contiguous()).mT)


def test_a_model_that_is_one_layer():
    layer = nn.Linear(64, 8)
    weights, _ = lf.loftq(layer, lf.LoRA(r=2), iters=2)
    assert {*weights} == {"weight"}
    layer.load_state_dict(weights, strict=False)
    assert torch.equal(layer.weight, weights["weight"])


def test_refuses():
    for wrong in (torch.tensor([1, 2]), torch.tensor([1.0, torch.inf])):
        with pytest.raises(ValueError, match=r"W: got torch\.\w+ or NaN or infinity"):
            lf.nf4(wrong)
    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(4, 8))
    with pytest.raises(TypeError, match="cfg: got DoRA, expected a LoRA"):
        lf.loftq(model, lf.DoRA())
    with pytest.raises(ValueError, match="iters: got 0"):
        lf.loftq(model, lf.LoRA(r=2), iters=0)
    with pytest.raises(TypeError, match="1: is a Embedding; LoftQ takes linear layers"):
        lf.loftq(model, lf.LoRA(r=2, target_modules="1"))
