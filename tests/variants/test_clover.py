"""CLOVER compared with its formula, with Q and R of each head."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.testing import Case, layers

FIT = {"fit": lambda d_in, d_out, r: (d_in + 3, 3 * d_out, r)}
CASE = Case("clover", lambda r: lf.CLOVER(head_dim=3), **FIT)


@given(data=st.data())
def test_formula(data):
    layer = data.draw(layers(CASE, scrambled=True))
    W, b, D = layer.module.weight, layer.module.bias, layer.leaves["D"]
    x = layer.x
    if b is not None:
        W, x = torch.cat([W, b[:, None]], 1), torch.cat([x, torch.ones_like(x[..., :1])], -1)
    outputs = []
    for h, core in enumerate(D):
        Q, R = torch.linalg.qr(W[3 * h : 3 * h + 3].mT)
        outputs.append(x @ Q @ (R + core))
    torch.testing.assert_close(layer.apply(), torch.cat(outputs, -1), atol=1e-5, rtol=1e-5)


def test_a_free_core_is_a_matrix_on_each_head():
    free = Case("clover", lambda r: lf.CLOVER(head_dim=3, core="free"), **FIT)
    layer = free.layer(d_in=5, d_out=2, r=1, scrambled=True)
    E = torch.block_diag(*layer.leaves["D"])
    torch.testing.assert_close(layer.apply(), layer.frozen() @ (torch.eye(6) + E))


def test_sums_are_exact():
    model, x = nn.Sequential(nn.Linear(8, 6)).double(), torch.randn(3, 8).double()
    cfg = lf.CLOVER(head_dim=3)
    each = [lf.init(model, cfg, dtype=torch.float64) for _ in range(2)]
    for params in each:
        params["0.clover.D"].data.normal_()
    changes = [lf.fcall(model, params, x) - model(x) for params in each]
    both = lf.combine([(each[0], 0.5), (each[1], -2.0)])
    expected = model(x) + 0.5 * changes[0] - 2 * changes[1]
    torch.testing.assert_close(lf.fcall(model, both, x), expected)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Linear(8, 7), "head_dim = 3 does not divide d_out = 7"),
        (nn.Linear(1, 6, bias=False), 'the rows of a head depend on each other, .* core="free"'),
    ],
)
def test_refuses_at_init(layer, message):
    with pytest.raises(ValueError, match=message):
        lf.init(nn.Sequential(layer), lf.CLOVER(head_dim=3))


def test_dependent_rows_are_refused():
    layer = nn.Linear(8, 6)
    layer.weight.data[1] = layer.weight.data[0]
    layer.bias.data.zero_()
    with pytest.raises(ValueError, match="the rows of a head depend on each other"):
        lf.init(nn.Sequential(layer), lf.CLOVER(head_dim=3))
    lf.init(nn.Sequential(layer), lf.CLOVER(head_dim=3, core="free"))


@pytest.mark.parametrize("field", [{"head_dim": 0}, {"core": "svd"}])
def test_settings_are_checked(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        lf.CLOVER(**field)
