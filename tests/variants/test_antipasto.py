"""AntiPaSTO compared with the paper's formula in dense matrices."""

import math

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.testing import Case, layers
from lora_func.variants import antipasto
from tests.support.parity import relative


def case(rotate, b=2, **settings):
    return Case(
        f"antipasto-{rotate}",
        lambda r: lf.AntiPaSTO(r=r, block_size=b, rotate=rotate, **settings),
        fit=lambda d_in, d_out, r: (b * d_in, b * d_out, b * r),
    )


def dense_rotation(rot, b, c, bound):
    """Eq. 4 and appendix A.4: the Cayley transform of a bounded skew-symmetric matrix."""
    blocks = []
    for upper in rot:
        P = torch.zeros(b, b, dtype=rot.dtype)
        P[tuple(torch.triu_indices(b, b, 1))] = upper
        a = 2 * math.tan(bound / 2)
        A = a * torch.tanh(0.5 * (P - P.T) / a)
        X, eye = c * A / 2, torch.eye(b, dtype=rot.dtype)
        blocks.append(torch.linalg.inv(eye - X) @ (eye + X))
    return torch.block_diag(*blocks)


def formula(p, W, b, c, bound):
    U, S, V = p["_U"], p["_S"], p["_Vh"].T
    rotated_U, rotated_V = U, V
    if "rot_V" in p:
        rotated_V = V @ dense_rotation(p["rot_V"], b, c, bound)
    if "rot_U" in p:
        rotated_U = U @ dense_rotation(p["rot_U"], b, c, bound)
    residual = W - U @ S.diag() @ V.T
    return residual + rotated_U @ (S + c * p["delta_s"]).diag() @ rotated_V.T


@given(
    data=st.data(),
    rotate=st.sampled_from(["V", "U", "both", "none"]),
    b=st.sampled_from([2, 3]),
    coeff=st.sampled_from([1.0, -1.0, 0.7]),
)
def test_formula(data, rotate, b, coeff):
    layer = data.draw(layers(case(rotate, b, coeff=coeff, max_angle=0.5), scrambled=True))
    W = formula(layer.leaves, layer.module.weight, b, coeff, 0.5)
    y = F.linear(layer.x, W, layer.module.bias)
    torch.testing.assert_close(layer.apply(), y, rtol=1e-9, atol=1e-9)


def rotation(rot, **constants):
    constants = {"_coeff": torch.tensor(1.0), "_max_angle": torch.tensor(0.5)} | constants
    E = antipasto.rotation(constants, rot)
    return E + torch.eye(E.shape[-1])


@pytest.mark.parametrize("b", [2, 4, 8])
def test_the_rotation_is_orthogonal_and_the_coefficient_turns_it_round(b):
    rot = torch.randn(3, b * (b - 1) // 2, dtype=torch.float64)
    forward, back = rotation(rot), rotation(rot, _coeff=torch.tensor(-1.0))
    eye = torch.eye(b, dtype=torch.float64).expand(3, b, b)
    torch.testing.assert_close(forward @ forward.mT, eye)
    torch.testing.assert_close(forward @ back, eye)
    torch.testing.assert_close(rotation(rot, _coeff=torch.tensor(0.0)), eye)


@pytest.mark.parametrize("b", [2, 4, 8, 16])
def test_the_largest_angle(b):
    """The largest angle follows the module docstring's formula when every entry is at its bound."""
    rot = torch.full((1, b * (b - 1) // 2), 1e6, dtype=torch.float64)
    angles = torch.linalg.eigvals(rotation(rot)[0]).angle().abs()
    bound = 2 * math.atan(math.tan(0.25) / math.tan(math.pi / (2 * b)))
    assert angles.max().item() == pytest.approx(bound)
    random = torch.linalg.eigvals(rotation(10 * torch.randn(500, rot.shape[1]).double()))
    assert random.angle().abs().max() <= bound + 1e-9


def test_nothing_outside_the_chosen_directions_changes():
    layer = case("V").layer(d_in=4, d_out=4, r=1, scrambled=True)
    change = layer.weight(layer.W) - layer.module.weight
    U, Vh = layer.leaves["_U"], layer.leaves["_Vh"]
    torch.testing.assert_close(U @ U.T @ change @ Vh.T @ Vh, change)


@pytest.mark.parametrize("pool", ["rms", "std"])
def test_directions_are_chosen_by_strength_times_activation(pool):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10)).double()
    _, S, Vh = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
    spread = torch.tensor([1, 1, 1, 9, 1, 1, 9, 1, 9, 1]).double()  # std per direction
    mean = torch.tensor([0, 0, 0, 0, 0, 20, 0, 0, 0, 0]).double()
    data = [(torch.randn(50, 10).double() * spread + mean) @ Vh for _ in range(4)]
    cfg = lf.AntiPaSTO(r=4, pool=pool)
    params = lf.init(model, cfg, data=data, dtype=torch.float64)
    h = torch.cat(data) @ Vh.T
    size = h.square().mean(0).sqrt() if pool == "rms" else h.std(0, correction=0)
    chosen = (S * size).topk(4).indices.sort().values
    assert (5 in chosen) == (pool == "rms")
    torch.testing.assert_close(params["0.antipasto._S"], S[chosen])
    torch.testing.assert_close(params["0.antipasto._Vh"].abs(), Vh[chosen].abs())


def test_without_data_the_strongest_directions_are_taken():
    model = nn.Sequential(nn.Linear(12, 10))
    params = lf.init(model, lf.AntiPaSTO(r=4))
    S = torch.linalg.svdvals(model[0].weight)
    torch.testing.assert_close(params["0.antipasto._S"], S[:4])


def test_a_whole_block_is_psoft_with_bounded_entries():
    """PEFT's PSOFT without magnitudes: B (R - I) A, where R is the Cayley transform of Q."""
    model = nn.Sequential(nn.Linear(48, 64))
    config = peft.PsoftConfig(
        r=6, psoft_alpha=6, psoft_mag_a=False, psoft_mag_b=False, target_modules=["0"]
    )
    params = lf.init(model, lf.AntiPaSTO(r=6, block_size=6))
    layer = peft.get_peft_model(model, config).base_model.model[0]
    layer.psoft_R["default"].weight.data.normal_(std=0.3)
    A, B = layer._psoft_A_cache["default"], layer._psoft_B_cache["default"]
    S = B.norm(dim=0)
    # h -> h R here, h -> R h in PEFT; X = Q is half of the bounded entries
    a = 2 * math.tan(math.pi / 6)
    Q = layer.psoft_R["default"].weight
    constants = {"_U": B / S, "_S": S, "_Vh": A, "rot_V": -2 * a * torch.atanh(2 * Q / a)[None]}
    params |= {f"0.antipasto.{leaf}": tensor for leaf, tensor in constants.items()}
    x = torch.randn(5, 48)
    base = nn.Sequential(layer.get_base_layer())
    assert relative(lf.fcall(base, params, x), layer(x)) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 6}, "r: got 6, expected a multiple of block_size=4"),
        ({"rank_pattern": {"q": 2}}, "r: got 2, expected a multiple of block_size=4"),
        ({"block_size": 1}, "block_size: got 1, expected an integer of at least 2"),
        ({"rotate": "W"}, "rotate: got 'W', expected one of 'V', 'U', 'both', 'none'"),
        ({"pool": "max"}, "pool: got 'max', expected one of 'rms', 'std'"),
        ({"max_angle": 0}, "max_angle: got 0, expected a finite number above 0"),
        ({"max_angle": 3.2}, r"max_angle: got 3\.2, expected less than π"),
        ({"coeff": math.nan}, "coeff: got nan, expected a finite number"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.AntiPaSTO(**settings)


def test_refuses_at_init():
    model = nn.Sequential(nn.Linear(8, 6))
    with pytest.raises(ValueError, match="0: antipasto: r = 8 exceeds"):
        lf.init(model, lf.AntiPaSTO(r=8))
    with pytest.raises(ValueError, match="0: antipasto: saw 3 tokens of data, needs at least 4"):
        lf.init(model, lf.AntiPaSTO(r=4), data=[torch.randn(3, 8)])
