"""LoReFT compared with eq. 2 of the paper."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.testing import Case, layers
from tests.support.cases import TALL
from tests.support.models import scramble

CASE = Case("loreft", lambda r: lf.LoReFT(r=r), **TALL)


def projection(R):
    """Orthonormal rows by QR, with the signs of a Cholesky factor."""
    Q, L = torch.linalg.qr(R.mT)
    return (Q * L.diagonal().sign()).mT


@given(data=st.data())
def test_formula(data):
    layer = data.draw(layers(CASE, scrambled=True))
    p, h = layer.leaves, layer.frozen()
    Q = projection(p["R"])
    S = p["S"] - p["_S0"] + projection(p["_R0"])
    expected = h + (h @ S.mT + p["b"] - h @ Q.mT) @ Q
    torch.testing.assert_close(layer.apply(), expected, atol=1e-6, rtol=1e-6)


def test_the_edit_stays_in_the_subspace_and_reaches_its_target():
    layer = CASE.layer(d_in=5, d_out=2, r=3, scrambled=True)
    p, before, after = layer.leaves, layer.frozen(), layer.apply()
    Q = projection(p["R"])
    torch.testing.assert_close((after - before) @ Q.mT @ Q, after - before)
    S = p["S"] - p["_S0"] + projection(p["_R0"])
    torch.testing.assert_close(after @ Q.mT, before @ S.mT + p["b"], atol=1e-6, rtol=1e-6)


def test_its_bias_is_merged():
    model, x = nn.Sequential(nn.Linear(8, 6, bias=False)).double(), torch.randn(3, 8).double()
    params = scramble(lf.init(model, lf.LoReFT(r=2), dtype=torch.float64))
    merged = lf.merge(model, params)
    y = x @ merged["0.weight"].mT + merged["0.bias"]
    torch.testing.assert_close(y, lf.fcall(model, params, x))


def test_ranks_beyond_the_outputs_are_refused():
    with pytest.raises(ValueError, match="0: loreft: r = 5 exceeds"):
        lf.init(nn.Sequential(nn.Linear(8, 4)), lf.LoReFT(r=5))
