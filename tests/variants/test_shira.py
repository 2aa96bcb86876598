"""SHiRA: its formula in dense matrices, its masks, and parity with PEFT."""

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

import lora_func as lf
from lora_func.testing import Case, layers
from tests.support.parity import assert_parity, same

SHIRA = Case("shira", lambda r: lf.SHiRA(r=1), fit=lambda d_in, d_out, r: (d_in + 2, d_out + 2, 1))


def entries(params, site="0"):
    rows, columns = params[f"{site}.shira._indices"].long()
    return set(zip(rows.tolist(), columns.tolist(), strict=True))


@given(layer=layers(SHIRA, scrambled=True))
def test_formula(layer):
    D = torch.zeros_like(layer.module.weight)
    rows, columns = layer.leaves["_indices"].long()
    for value, i, j in zip(layer.leaves["values"], rows, columns, strict=True):
        assert D[i, j] == 0
        D[i, j] = value
    W = layer.module.weight + D
    torch.testing.assert_close(layer.apply(), F.linear(layer.x, W, layer.module.bias))
    torch.testing.assert_close(layer.variant.delta_norm(layer.leaves, None), D.norm())


def test_positions_are_distinct_and_sorted_row_by_row():
    model = nn.Sequential(nn.Linear(20, 12))
    params = lf.init(model, lf.SHiRA(r=3))
    rows, columns = params["0.shira._indices"]
    flat = rows * 20 + columns
    assert torch.equal(flat, flat.unique())
    assert len(flat) == 3 * (20 + 12)
    assert entries(params) == entries(lf.init(model, lf.SHiRA(r=3)))
    assert entries(params) != entries(lf.init(model, lf.SHiRA(r=3), seed=1))


def test_magnitude_takes_the_largest_entries():
    model = nn.Sequential(nn.Linear(20, 12))
    chosen = entries(lf.init(model, lf.SHiRA(r=1, mask="magnitude")))
    largest = model[0].weight.abs().flatten().topk(32).indices
    assert chosen == {divmod(i, 20) for i in largest.tolist()}


@pytest.mark.parametrize("mask", ["gradient", "snip"])
def test_masks_from_gradients(mask):
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 9))
    data = [torch.randn(5, 20) for _ in range(3)]

    def loss_fn(y, batch):
        return y.square().mean()

    params = lf.init(model, lf.SHiRA(r=1, mask=mask), data=data, loss_fn=loss_fn)
    assert all(parameter.grad is None for parameter in model.parameters())
    sum(loss_fn(model(batch), batch) for batch in data).backward()
    for site in ("0", "2"):
        W = model.get_submodule(site).weight
        score = (W.grad if mask == "gradient" else W * W.grad).abs().flatten()
        largest = score.topk(sum(W.shape)).indices.tolist()
        assert entries(params, site) == {divmod(i, W.shape[1]) for i in largest}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("bias", [True, False])
def test_parity_with_peft(bias):
    assert_parity(
        lf.SHiRA(r=2),
        peft.ShiraConfig(r=2, target_modules=["0"], random_seed=0),
        lambda layer: {"values": (layer.shira_weight["default"], same)},
        constants=lambda layer: {"_indices": layer.shira_indices["default"].double()},
        bias=bias,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r: got 0, expected an integer of at least 1"),
        ({"mask": "struct"}, "mask: got 'struct', expected one of 'random', 'magnitude'"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.SHiRA(**settings)


def test_refuses_at_init():
    model = nn.Sequential(nn.Linear(4, 3))
    for factor in (0.0, torch.nan):
        with pytest.raises(ValueError, match="0: shira: the gradient is zero, or holds NaN"):
            lf.init(
                model,
                lf.SHiRA(r=1, mask="gradient"),
                data=[torch.ones(2, 4)],
                loss_fn=lambda y, _, factor=factor: factor * y.sum(),
            )
    with pytest.raises(ValueError, match="0: shira: r = 2 asks for 14 entries, the weight has 12"):
        lf.init(model, lf.SHiRA(r=2))
    with pytest.raises(ValueError, match="0: shira: mask='snip' needs calibration data; pass init"):
        lf.init(model, lf.SHiRA(r=1, mask="snip"))
