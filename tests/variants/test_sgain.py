"""SGain compared with its formula in dense matrices, on both sides, with a core, and from data."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import elu

import lora_func as lf
from lora_func.testing import Case, layers
from lora_func.variants import sgain


def case(**settings):
    return Case("sgain", lambda r: lf.SGain(r=r, coeff=0.7, **settings))


def formula(layer, core=0.0):
    """S becomes S (1 + elu(c g)) on the largest directions, and a core is added between them."""
    W, p = layer.module.weight, layer.leaves
    r = len(p["gains"])
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    changed = torch.diag(S[:r] * elu(0.7 * p["gains"])) + core
    return W + U[:, :r] @ changed @ Vh[:r]


@pytest.mark.parametrize("side", ["out", "in", "auto"])
@given(data=st.data())
def test_formula(side, data):
    layer = data.draw(layers(case(side=side), scrambled=True))
    torch.testing.assert_close(layer.weight(), formula(layer), atol=1e-6, rtol=1e-5)


def test_formula_with_a_core():
    layer = case(k=2).layer(d_in=7, d_out=6, r=4, scrambled=True)
    p, W = layer.leaves, layer.module.weight
    core = torch.diag(p["_S"] * elu(0.7 * p["gains"])) + 0.7 * p["B"] @ p["A"]
    torch.testing.assert_close(layer.weight(), W + p["_U"] @ core @ p["_Vh"])


def test_singular_values_never_turn_round():
    layer = case(side="out").layer(d_in=7, d_out=6, r=6, scrambled=True)
    p = {**layer.leaves, "gains": torch.tensor([-50.0, -3, -1, 0, 1, 2]).double()}
    before = torch.linalg.svdvals(layer.module.weight)
    after = torch.linalg.svdvals(sgain.weight(layer.module.weight, p))
    expected = before * (1 + elu(0.7 * p["gains"]))
    torch.testing.assert_close(after, expected.sort(descending=True).values)


def test_the_smaller_side_is_kept():
    wide, tall = (nn.Sequential(nn.Linear(*shape)) for shape in ((8, 5), (5, 8)))
    assert "0.sgain._U" in lf.init(wide, lf.SGain(r=2))
    assert "0.sgain._Vh" in lf.init(tall, lf.SGain(r=2))


@pytest.mark.parametrize("basis", ["corda", "asvd"])
def test_bases_from_data_lose_less_than_the_plain_one(basis):
    """The best rank-r part of W under the inputs: E‖(W - P W) x‖² is smaller (Eckart-Young)."""
    torch.manual_seed(0)
    scale = torch.linspace(0.1, 3, 12)
    model, x = nn.Sequential(nn.Linear(12, 10, bias=False)), torch.randn(400, 12) * scale

    def lost(cfg, **data):
        U = lf.init(model, cfg, **data)["0.sgain._U"]
        y = model(x)
        return (y - y @ U @ U.mT).square().sum().item()

    plain = lost(lf.SGain(r=4, side="out"))
    assert lost(lf.SGain(r=4, basis=basis), data=[x]) < 0.9 * plain
    tiny = lost(lf.SGain(r=4, basis=basis), data=[1e-3 * x])
    assert tiny == pytest.approx(lost(lf.SGain(r=4, basis=basis), data=[x]), rel=1e-3)


def test_data_choose_directions_of_a_plain_basis():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    Vh = torch.linalg.svd(model[0].weight.detach()).Vh
    x = torch.randn(64, 2) @ Vh[-2:] * 100
    params = lf.init(model, lf.SGain(r=2, side="in"), data=[x])
    overlap = (params["0.sgain._Vh"] @ Vh[-2:].mT).abs()
    torch.testing.assert_close(overlap, torch.eye(2), atol=1e-4, rtol=0)


def test_a_gain_beyond_its_bound_is_not_stuck():
    """A clamp in the forward pass would keep a gain for ever that steps over its bound."""
    model, x = nn.Sequential(nn.Linear(8, 8, bias=False)).double(), torch.randn(64, 8).double()
    cfg = lf.SGain(r=8, suppress_only=True, side="out")
    params = lf.init(model, cfg, dtype=torch.float64)
    leaf, target = params["0.sgain.gains"], 0.5 * model(x).detach()
    leaf.data.fill_(0.3)
    optimizer = torch.optim.Adam([leaf], 0.05)
    for _ in range(200):
        with torch.no_grad():
            leaf.copy_(lf.project(params)["0.sgain.gains"])
        optimizer.zero_grad()
        (lf.fcall(model, params, x) - target).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(
        1 + elu(leaf.detach()), torch.full((8,), 0.5).double(), atol=0.02, rtol=0
    )


@pytest.mark.parametrize(("coeff", "kept"), [(1.0, [-1.0, 0.0]), (-1.0, [0.0, 2.0])])
def test_what_amplifies_is_brought_to_zero(coeff, kept):
    leaves = {
        "gains": torch.tensor([-1.0, 2.0]),
        "_coeff": torch.tensor(coeff),
        "_suppress": torch.ones(()),
    }
    assert sgain.project(leaves)["gains"].tolist() == kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": "up"}, "side: got 'up'"),
        ({"basis": "pca"}, "basis: got 'pca'"),
        ({"basis": "corda", "k": 2}, "basis: got 'corda', which has no directions of the inputs"),
        ({"basis": "asvd", "side": "in"}, "basis: got 'asvd', which has no directions"),
        ({"k": 65}, "k: got 65, expected at most r = 64"),
        ({"coeff": float("nan")}, "coeff"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.SGain(**settings)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "basis='corda' needs calibration data"),
        ([torch.zeros(99, 8)], "its inputs are all zero"),
        ([torch.randn(2, 8)], "saw 2 tokens of data, needs at least 4"),
    ],
)
def test_bases_need_data(data, message):
    with pytest.raises(ValueError, match=message):
        lf.init(nn.Sequential(nn.Linear(8, 8)), lf.SGain(r=4, basis="corda"), data=data)
