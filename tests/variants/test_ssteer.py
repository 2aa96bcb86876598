"""S-steer: its formulas in dense matrices, and its calibration."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.testing import Case, layers
from tests.support.parity import relative

MODES = ("scale", "exp", "add", "ablate")


def case(mode, coeff=0.3):
    return Case(
        f"ssteer-{mode}",
        lambda r: lf.SSteer(mode=mode, coeff=coeff),
        data="pairs" if mode in ("add", "ablate") else None,
    )


def formula(mode, layer, c=0.3):
    p, W, b, x = layer.leaves, layer.module.weight, layer.module.bias, layer.x
    U, S, Vh, delta = p["_U"], p["_S"], p["_Vh"], p["delta"]
    a = S.sqrt() * delta
    y = F.linear(x, W, b)
    if mode == "scale":
        return F.linear(x, W + U @ (S * c * delta).diag() @ Vh, b)
    if mode == "exp":
        gain = (c * delta).clamp(-4, 4).exp() - 1
        return F.linear(x, W + U @ (S * gain).diag() @ Vh, b)
    s = (x @ Vh.T) * S.sqrt()
    if mode == "add":
        gate = ((s @ delta) / (s.norm(dim=-1) * delta.norm())).abs()
        return y + c * gate[..., None] * (U @ a)
    return y - (s @ delta)[..., None] * (U @ a) + c * (U @ a)


@given(data=st.data(), mode=st.sampled_from(MODES))
def test_formula(data, mode):
    layer = data.draw(layers(case(mode), scrambled=True))
    torch.testing.assert_close(layer.apply(), formula(mode, layer), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["scale", "exp", "add"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_coefficient_of_zero_is_off(mode, dtype):
    layer = case(mode, coeff=0.0).layer(scrambled=True, dtype=dtype, leaf_dtype=torch.float32)
    assert torch.equal(layer.apply(), layer.module(layer.x))


def test_exp_is_clamped_and_never_turns_a_singular_value_round():
    layer = case("exp", coeff=100.0).layer(scrambled=True)
    U, S, Vh = (layer.leaves[name] for name in ("_U", "_S", "_Vh"))
    steered = (U.T @ layer.weight(layer.W) @ Vh.T).diagonal()
    assert (steered > 0).all()
    assert (steered <= S * math.exp(4) * (1 + 1e-9)).all()


def pairs(W, seed=0, n=40):
    """Last tokens differ along the third right singular vector; row lengths are unequal."""
    torch.manual_seed(seed)
    _, _, Vh = torch.linalg.svd(W, full_matrices=False)

    def batch(offset):
        inputs = torch.randn(n, 5, W.shape[1], dtype=W.dtype)
        mask = torch.ones(n, 5, dtype=torch.long)
        mask[::2, -2:] = 0
        inputs[:, -1] += offset
        inputs[::2, 2] += offset
        inputs[::2, -1] = 1e3
        return {"x": inputs, "attention_mask": mask}

    return [(batch(-4 * Vh[2]), batch(4 * Vh[2])) for _ in range(2)]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(9, 7).double()

    def forward(self, x, attention_mask):
        return self.layer(x)


@pytest.mark.parametrize("mode", MODES)
def test_calibration_finds_the_direction(mode):
    model = Model()
    W = model.layer.weight.detach()
    data = pairs(W)
    cfg = lf.SSteer(mode=mode, coeff=0.5)
    params = lf.init(model, cfg, data=data, dtype=torch.float64)
    leaves = {key.rsplit(".", 1)[1]: leaf.detach() for key, leaf in params.items()}
    U, S, Vh, delta = (leaves[name] for name in ("_U", "_S", "_Vh", "delta"))
    torch.testing.assert_close((U * S) @ Vh, W)
    torch.testing.assert_close(delta.norm(), torch.ones((), dtype=torch.float64))
    assert delta.abs().argmax() == 2

    def last(batch):
        last_token = batch["attention_mask"].sum(1) - 1
        return batch["x"][torch.arange(len(last_token)), last_token]

    differences = torch.cat([last(positive) - last(negative) for positive, negative in data])
    projected = differences @ Vh.T * S.sqrt()
    torch.testing.assert_close(delta, F.normalize(projected.mean(0), dim=0))
    assert ((projected > 0).double().mean(0) >= 0.5).all()


def test_r_takes_the_directions_in_which_the_pairs_differ_most():
    model = Model()
    data = pairs(model.layer.weight.detach())
    params = lf.init(model, lf.SSteer(r=1, coeff=0.5), data=data, dtype=torch.float64)
    S = torch.linalg.svdvals(model.layer.weight)
    torch.testing.assert_close(params["layer.ssteer._S"], S[2:3])
    assert params["layer.ssteer.delta"].abs().item() == 1


def test_the_signs_of_singular_pairs_are_part_of_the_method():
    """The signs matter for scale but not for add and ablate, so the file stores them."""
    for mode, seen in (("scale", True), ("add", False), ("ablate", False)):
        layer = case(mode).layer(scrambled=True)
        sign = torch.tensor([-1.0, 1, 1, 1, 1]).double()
        p = layer.leaves
        turned = {"_U": p["_U"] * sign, "_Vh": p["_Vh"] * sign[:, None], "delta": p["delta"] * sign}
        assert (relative(layer.apply(turned), layer.apply()) > 1e-3) == seen


def test_a_single_direction_may_be_steered_at_any_positive_strength():
    model = Model()
    data = pairs(model.layer.weight.detach())
    lf.init(model, lf.SSteer(r=1, coeff=4.59), data=data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "rotate"}, "mode: got 'rotate', expected one of 'scale', 'exp', 'add', 'ablate'"),
        ({"r": 0}, "r: got 0, expected an integer of at least 1, or -1 for all"),
        ({"r": -1.0}, r"r: got -1\.0, expected an integer"),
        ({"coeff": math.inf}, "coeff: got inf, expected a finite number"),
        ({"clamp": 0}, "clamp: got 0, expected a finite number above 0"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.SSteer(**settings)


def test_refuses_at_init():
    model = Model()
    data = pairs(model.layer.weight.detach())
    same = [(positive, positive) for positive, _ in data]
    for cfg, given_data, message in (
        (lf.SSteer(mode="add"), None, "layer: ssteer_add: mode='add' needs pairs of batches"),
        (lf.SSteer(mode="ablate"), None, "layer: ssteer_ablate: mode='ablate' needs pairs"),
        (lf.SSteer(r=8), None, "layer: ssteer: r = 8 exceeds"),
        (lf.SSteer(mode="exp"), same, r"layer: ssteer_exp: 80 pairs differ by 0\.0; pass others"),
        (lf.SSteer(coeff=-4.59), data, r"coeff = -4\.59 times delta reaches -.* turns a singular"),
    ):
        with pytest.raises(ValueError, match=message):
            lf.init(model, cfg, data=given_data)
