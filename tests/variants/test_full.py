"""Full: parameters of linear layers and of all other modules."""

import pytest
import torch
from torch import nn

import lora_func as lf


class Everything(nn.Module):
    """One module of each kind that has parameters, and a parameter of the root module."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(4))
        self.embedding = nn.Embedding(7, 4)
        self.convolution = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.gru = nn.GRU(4, 4, batch_first=True)

    def forward(self, ids):
        x = self.embedding(ids) + self.token
        x = self.convolution(x.mT).mT
        return self.linear(self.norm(self.gru(x)[0]))


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_every_parameter_of_every_kind_of_module():
    model = Everything()
    params = lf.init(model, lf.Full(target_parameters=".*"))
    assert {key.replace(".full.", ".").lstrip(".").removeprefix("full.") for key in params} == {
        name for name, _ in model.named_parameters()
    }
    assert torch.equal(lf.fcall(model, params, IDS), model(IDS))

    other = Everything()
    theirs = dict(other.named_parameters())
    params = {
        key: theirs[key.replace("full.", "").lstrip(".")].detach().clone().requires_grad_()
        for key in params
    }
    torch.testing.assert_close(lf.fcall(model, params, IDS), other(IDS))
    gradients = torch.autograd.grad(lf.fcall(model, params, IDS).square().sum(), [*params.values()])
    expected = torch.autograd.grad(
        other(IDS).square().sum(), [theirs[key.replace("full.", "").lstrip(".")] for key in params]
    )
    for key, ours, reference in zip(params, gradients, expected, strict=True):
        torch.testing.assert_close(ours, reference, msg=key)


def test_vmap_over_a_norm_and_an_embedding():
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4))
    cfg = lf.Full(target_parameters=".*")
    adapters = [{k: v + 0.1 * i for k, v in lf.init(model, cfg).items()} for i in range(3)]
    outputs = torch.vmap(lf.fcall, in_dims=(None, 0, None))(model, lf.stack(adapters), IDS)
    torch.testing.assert_close(outputs, torch.stack([lf.fcall(model, a, IDS) for a in adapters]))


def test_float32_leaves_of_a_bfloat16_norm():
    model = nn.Sequential(nn.LayerNorm(4)).to(torch.bfloat16)
    params = lf.init(model, lf.Full(target_parameters=".*"))
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    y = lf.fcall(model, params, x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, model(x))
    gradient, *_ = torch.autograd.grad(y.sum(), [*params.values()])
    assert gradient.dtype == torch.float32


def test_a_dtype_that_cannot_hold_the_parameter_is_refused():
    model = nn.Sequential(nn.Linear(2, 2)).double()
    with pytest.raises(
        ValueError, match=r"0\.full\.weight: .*cannot hold.*pass dtype=torch\.float64"
    ):
        lf.init(model, lf.Full(target_parameters="weight"))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


@pytest.mark.parametrize("pattern", [r"embed\.weight", r"head\.weight", "weight"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_tied_parameter_is_trained_in_all_its_places(pattern, frozen):
    model, ids = Tied().requires_grad_(not frozen), torch.arange(5)
    params = lf.init(model, lf.Full(target_parameters=pattern))
    (key,) = params
    moved = (params[key] + torch.randn(5, 4)).detach().requires_grad_()
    expected = moved @ moved.T + model.head.bias
    y = lf.fcall(model, {key: moved}, ids)
    torch.testing.assert_close(y, expected)
    ours, theirs = (torch.autograd.grad(z.square().sum(), moved) for z in (y, expected))
    torch.testing.assert_close(ours, theirs)


def test_parameters_over_the_same_memory_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.T)
    with pytest.raises(ValueError, match=r"1\.weight: shares its memory with 0\.weight"):
        lf.init(model, lf.Full(target_parameters=r"1\.weight"))


def test_a_tie_outside_the_layers_does_not_matter():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["a"].weight = model["b"].weight
    model["blocks"] = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    params = lf.init(model, lf.Full(target_parameters="weight", layers=0))
    assert list(params) == ["blocks.0.full.weight"]


def test_a_name_that_would_be_a_constant_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0]._gain = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=r"0\._gain: a leaf whose name starts with an underscore"):
        lf.init(model, lf.Full(target_parameters="gain"))


def test_integers_are_refused():
    model = nn.Module()
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"codes: torch\.uint8 cannot be trained"):
        lf.init(model, lf.Full(target_parameters="codes"))


@pytest.mark.parametrize(
    ("patterns", "error", "message"),
    [
        ("nothing", ValueError, "target_parameters: 'nothing' matches no site; nearest are"),
        ([], ValueError, "target_parameters: got no pattern"),
        ("(", ValueError, r"target_parameters: '\(' is no regular expression"),
        ([3], TypeError, "target_parameters: got 3, expected a regular expression"),
    ],
)
def test_refuses_patterns(patterns, error, message):
    with pytest.raises(error, match=message):
        lf.init(nn.Linear(2, 2), lf.Full(target_parameters=patterns))
