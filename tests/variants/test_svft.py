"""SVFT compared with its formula in dense matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.testing import Case, layers

CASES = [
    Case("svft", lambda r: lf.SVFT()),
    Case(
        "svft-band",
        lambda r: lf.SVFT(r=r, band=1),
        fit=lambda d_in, d_out, r: (d_in + 1, d_out + 1, r + 1),
    ),
    Case("svft-random", lambda r: lf.SVFT(r=r, pattern="random")),
]


def dense_core(p):
    r = p["_U"].shape[1]
    M = torch.zeros(r, r, dtype=p["m"].dtype)
    rows, columns = p["_places"].long()
    M[rows, columns] = p["m"]
    return M


@given(data=st.data(), case=st.sampled_from(CASES))
def test_formula(data, case):
    layer = data.draw(layers(case, scrambled=True))
    p = layer.leaves
    change = p["_U"] @ dense_core(p) @ p["_Vh"]
    torch.testing.assert_close(layer.weight(), layer.module.weight + change)


def test_the_vectors_are_those_of_the_weight():
    layer = CASES[0].layer(d_in=6, d_out=5)
    S = torch.linalg.svdvals(layer.module.weight)
    diagonal = layer.with_leaves({"m": S}).weight() - layer.module.weight
    torch.testing.assert_close(diagonal, layer.module.weight)


@pytest.mark.parametrize(("r", "band"), [(5, 0), (5, 2), (7, 6)])
def test_the_number_of_entries(r, band):
    params = lf.init(nn.Sequential(nn.Linear(8, 9)), lf.SVFT(r=r, band=band))
    assert len(params["0.svft.m"]) == r * (2 * band + 1) - band * (band + 1)


def test_random_entries_are_different_and_follow_the_seed():
    model, cfg = nn.Sequential(nn.Linear(8, 9)), lf.SVFT(band=2, pattern="random")
    one, same, other = (lf.init(model, cfg, seed=seed)["0.svft._places"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert len({*map(tuple, one.T.tolist())}) == one.shape[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r: got 0, expected an integer of at least 1"),
        ({"band": -1}, "band: got -1, expected an integer of at least 0"),
        ({"pattern": "top_k"}, "pattern: got 'top_k', expected one of 'banded', 'random'"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.SVFT(**settings)


def test_refuses_a_layer():
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(ValueError, match="band = 4 is no smaller than the 4 singular directions"):
        lf.init(model, lf.SVFT(band=4))
    with pytest.raises(ValueError, match="r = 5 exceeds"):
        lf.init(model, lf.SVFT(r=5))
