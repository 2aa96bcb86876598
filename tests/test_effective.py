"""Convolutions, embeddings, stacked experts, attention's own weights, tied ones: matrices all."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import lora_func as lf
from lora_func._keys import SHARED, group
from lora_func._weight import Affine
from lora_func.variants import by_name
from tests.cases import CASES
from tests.models import scramble


class Experts(nn.Module):
    """Stacked expert weights, in both of the layouts that transformers' models have."""

    def __init__(self, is_transposed=False):
        super().__init__()
        shape = (3, 8, 12) if is_transposed else (3, 12, 8)
        self.up, self.is_transposed = nn.Parameter(torch.randn(shape)), is_transposed
        self.up_bias = nn.Parameter(torch.randn(3, 12))

    def forward(self, x):
        up = self.up if self.is_transposed else self.up.mT
        return torch.einsum("bd,edf->bef", x, up) + self.up_bias


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def tokens(n=4):
    return torch.randint(0, 16, (2, n))


# a model, its input, the site, and the name of its weight
PLACES = {
    "conv1d": (nn.Conv1d(4, 8, 2), torch.randn(2, 4, 5), {"target_modules": ""}, "weight"),
    "conv2d": (
        nn.Conv2d(4, 8, (2, 1), padding=1, stride=2, padding_mode="circular"),
        torch.randn(2, 4, 5, 6),
        {"target_modules": ""},
        "weight",
    ),
    "grouped": (
        nn.Conv2d(8, 8, 2, groups=2),
        torch.randn(2, 8, 4, 4),
        {"target_modules": ""},
        "weight",
    ),
    "embedding": (nn.Embedding(16, 8, padding_idx=0), tokens(), {"target_modules": ""}, "weight"),
    "experts": (
        Experts(),
        torch.randn(5, 8),
        {"target_modules": (), "target_parameters": "up$"},
        "up",
    ),
    "transposed experts": (
        Experts(is_transposed=True),
        torch.randn(5, 8),
        {"target_modules": (), "target_parameters": "up$"},
        "up",
    ),
    "attention's input": (
        Attention(),
        torch.randn(2, 3, 8),
        {"target_modules": (), "target_parameters": "in_proj_weight"},
        "attention.in_proj_weight",
    ),
    "attention's output": (
        Attention(),
        torch.randn(2, 3, 8),
        {"target_modules": "out_proj"},
        "attention.out_proj.weight",
    ),
    "a parameter": (
        nn.Sequential(Conv1D(6, 8)),
        torch.randn(3, 8),
        {"target_modules": (), "target_parameters": "weight"},
        "0.weight",
    ),
}
for model, *_ in PLACES.values():
    model.requires_grad_(False).double()
EACH_PLACE = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


def as_matrix(name, model, weight):
    if isinstance(model, (nn.Conv1d, nn.Conv2d)):
        return weight.flatten(1)
    transposed = isinstance(model, nn.Embedding) or getattr(model, "is_transposed", False)
    conv1d = name == "0.weight"
    return weight.mT if transposed or conv1d else weight


def with_new_weights(model, params, name):
    """The model's parameters, with W' and b' put where W and b were, one matrix after another."""
    parameters = dict(model.named_parameters())
    weight = parameters[name]
    W = as_matrix(name, model, weight)
    bias_name = name.removesuffix("weight") + "bias" if name.endswith("weight") else f"{name}_bias"
    bias = parameters.get(bias_name)
    ((_, variant_name), keys) = next(iter(group(params).items()))
    variant = by_name(variant_name)
    stacked = W.ndim == 3
    weights, biases = [], []
    for i in range(len(W) if stacked else 1):
        leaves = {
            leaf: params[key][i] if stacked and not key.startswith(SHARED) else params[key]
            for leaf, key in keys.items()
        }
        one = Affine(W[i] if stacked else W, bias[i] if stacked and bias is not None else bias)
        weights.append(variant.weight(one, leaves))
        biases.append(variant.bias(one.bias, leaves) if variant.bias else one.bias)
    new = torch.stack(weights) if stacked else weights[0]
    parameters[name] = as_matrix(name, model, new).reshape(weight.shape)
    if biases[0] is not None:
        parameters[bias_name] = torch.stack(biases) if stacked else biases[0]
    return parameters


NO_DATA = [
    case
    for case in CASES
    if not case.data and not case.name.startswith("full") and case.name != "bitfit-new"
]


def adapter(case, place, seed=0):
    model, _, where, _ = place
    _, _, r = case.fit(8, 8, 2)
    cfg = case.config(r)
    return lf.init(model, replace(cfg, **where), seed=seed, dtype=torch.float64)


@EACH_PLACE
@pytest.mark.parametrize("case", NO_DATA, ids=repr)
def test_the_adapted_module_runs_with_the_adapted_weight(case, place):
    model, x, _, name = place
    x = x.double() if x.is_floating_point() else x
    if case.bias and isinstance(model, nn.Embedding):
        with pytest.raises(ValueError, match="has no bias"):
            adapter(case, place)
        return
    params = adapter(case, place)
    frozen = model(x)
    if case.start == "exact":
        with torch.no_grad():  # for weights that require grad torch picks other kernels
            assert torch.equal(lf.fcall(model, params, x), frozen)
    params = scramble(params)
    y = lf.fcall(model, params, x)
    expected = functional_call(model, with_new_weights(model, params, name), (x,))
    torch.testing.assert_close(y, expected)
    assert not torch.equal(y, frozen)
    trained = lf.partition(params)[0]
    ours, theirs = (
        torch.autograd.grad(z.square().sum(), [*trained.values()], allow_unused=True)
        for z in (y, expected)
    )
    torch.testing.assert_close(ours, theirs)
    if isinstance(model, nn.Embedding) or any(key.endswith("dora.A") for key in trained):
        return
    assert all(gradient is not None and gradient.any() for gradient in ours)


@EACH_PLACE
def test_vmap(place):
    case = next(case for case in CASES if case.name == "lora")
    model, x, *_ = place
    x = x.double() if x.is_floating_point() else x
    adapters = [scramble(adapter(case, place, seed), seed) for seed in range(2)]
    ours = torch.vmap(lf.fcall, (None, 0, None))(model, lf.stack(adapters), x)
    torch.testing.assert_close(ours, torch.stack([lf.fcall(model, one, x) for one in adapters]))
