"""The starts of LoRA, each compared with its formula and with PEFT."""

import copy
import math

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

import lora_func as lf
from lora_func.testing import layers
from tests.support.cases import CASES, OF_STARTS
from tests.support.models import batch_for
from tests.support.parity import assert_parity, relative, same
from tests.support.quantised import make_quantised

R, ALPHA = 4, 6.0
S = ALPHA / R
STARTS = [
    case
    for case in (*CASES, *OF_STARTS)
    if case.variant.name in ("olora", "milora", "corda", "lora_ga")
]


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(24, 20)).requires_grad_(False)


def loss_fn(y, batch=None):
    return y.square().sum()


def leaves(params):
    return {key.rsplit(".", 1)[1]: leaf.detach() for key, leaf in params.items()}


def subtracted(params):
    p = leaves(params)
    return p["_scale"] * p["_B0"] @ p["_A0"]


@given(data=st.data(), case=st.sampled_from(STARTS))
def test_the_start_is_subtracted_in_the_call(data, case):
    layer = data.draw(layers(case, scrambled=True))
    p, W = layer.leaves, layer.module.weight
    W = W + p["_scale"] * (p["B"] @ p["A"] - p["_B0"] @ p["_A0"])
    torch.testing.assert_close(layer.apply(), F.linear(layer.x, W, layer.module.bias))


def test_olora_is_pefts(model):
    params = lf.init(model, lf.OLoRA(r=R, alpha=ALPHA))
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, init_lora_weights="olora", target_modules=["0"])
    layer = peft.get_peft_model(copy.deepcopy(model), config).base_model.model[0]
    p = leaves(params)
    assert relative(p["A"], layer.lora_A["default"].weight) < 1e-6
    assert relative(p["B"], layer.lora_B["default"].weight) < 1e-6
    residual = model[0].weight - subtracted(params)
    assert relative(layer.get_base_layer().weight, residual) < 1e-6


def test_milora_takes_the_smallest_singular_components(model):
    model = model.double()
    params = lf.init(model, lf.MiLoRA(r=R, alpha=ALPHA), dtype=torch.float64)
    U, singular, Vh = torch.linalg.svd(model[0].weight, full_matrices=False)
    assert relative(subtracted(params), (U[:, -R:] * singular[-R:]) @ Vh[-R:]) < 1e-10
    p = leaves(params)
    torch.testing.assert_close(p["A"].norm(dim=1), p["B"].norm(dim=0))


def calibration(model, batches=1):
    return [torch.randn(30, 24, generator=torch.Generator().manual_seed(i)) for i in range(batches)]


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_pefts(model, method):
    data = calibration(model)
    params = lf.init(model, lf.CorDA(r=R, alpha=ALPHA, method=method), data=data)
    config = peft.LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
        target_modules=["0"],
    )
    theirs = copy.deepcopy(model)
    preprocess_corda(theirs, config, run_model=lambda: theirs(data[0]))
    layer = peft.get_peft_model(theirs, config).base_model.model[0]
    residual = model[0].weight - subtracted(params)
    assert relative(layer.get_base_layer().weight, residual) < 1e-5


@pytest.mark.parametrize(
    "cfg",
    [
        lf.MiLoRA(r=2),
        lf.OLoRA(r=2),
        lf.MiCA(r=2),
        lf.CorDA(r=2),
        lf.LoRAGA(r=2),
        lf.LoRAOne(r=2, step=False),
    ],
    ids=lambda cfg: type(cfg).__name__,
)
def test_the_start_is_exact_on_four_bits(cfg):
    base = make_quantised("qwen3", "nf4")
    batches = [batch_for(base, seed=seed) for seed in range(2)]
    params = lf.init(base, cfg, data=batches if cfg.calibration else None)
    inputs = {key: t for key, t in batches[0].items() if key != "labels"}
    assert torch.equal(lf.fcall(base, params, inputs).logits, base(**inputs).logits)
    with torch.no_grad():
        for leaf in lf.partition(params)[0].values():
            leaf += 0.1 * torch.randn_like(leaf)
    assert not torch.equal(lf.fcall(base, params, inputs).logits, base(**inputs).logits)


def test_corda_by_the_root_is_a_projection_of_the_weight(model):
    (x,) = calibration(model)
    params = lf.init(model, lf.CorDA(r=R, root=True), data=[x])
    C = (x.T @ x).double()
    C += 0.01 * C.diagonal().mean() * torch.eye(24)
    values, vectors = torch.linalg.eigh(C)
    W = model[0].weight.double()
    U = torch.linalg.svd(W @ (vectors * values.sqrt()) @ vectors.T).U[:, :R]
    assert relative(subtracted(params).double(), U @ U.T @ W) < 1e-5


def test_corda_needs_data_that_is_not_zero(model):
    with pytest.raises(ValueError, match="0: corda: needs calibration data"):
        lf.init(model, lf.CorDA(r=R))
    with pytest.raises(ValueError, match="its inputs are all zero"):
        lf.init(model, lf.CorDA(r=R), data=[torch.zeros(3, 24)])


def gradient(model, data):
    W = model[0].weight.clone().requires_grad_()
    total = sum(loss_fn(F.linear(x, W, model[0].bias)) for x in data)
    return torch.autograd.grad(total, W)[0]


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_is_pefts_on_request(model, direction, scale):
    """Up to the signs of singular vectors; PEFT's randomised SVD is exact at this size."""
    data = calibration(model)
    cfg = lf.LoRAGA(r=R, alpha=ALPHA, direction=direction, scale_by=scale, peft_compat=True)
    params = lf.init(model, cfg, data=data, loss_fn=loss_fn)
    config = peft.LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction=direction, scale=scale),
        target_modules=["0"],
    )
    theirs = copy.deepcopy(model)
    theirs[0].weight.requires_grad_()
    x = data[0].clone().requires_grad_()
    preprocess_loraga(theirs, config, lambda: loss_fn(theirs(x)).backward())
    layer = peft.get_peft_model(theirs, config).base_model.model[0]
    p = leaves(params)
    tolerance = 2e-2 if scale == "weight_svd" else 1e-3
    for ours, other in ((p["A"], layer.lora_A), (p["B"], layer.lora_B)):
        assert relative(ours.abs(), other["default"].weight.abs()) < tolerance


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_follows_the_authors(model, scale):
    data = calibration(model, batches=2)
    cfg = lf.LoRAGA(r=R, alpha=ALPHA, scale_by=scale)
    p = leaves(lf.init(model, cfg, data=data, loss_fn=loss_fn))
    U, _, Vh = torch.linalg.svd(gradient(model, data))
    of_W = torch.linalg.svdvals(model[0].weight)[:R]
    c = {
        "stable": 20**0.25 / 4,
        "weight_svd": (of_W / S).sqrt().mean(),
        "gd_scale": 1 / S,
        "unit": 1.0,
    }[scale]
    assert relative(p["A"].T @ p["A"], c**2 * Vh[:R].T @ Vh[:R]) < 1e-3
    minor = U[:, R : 2 * R]
    assert relative(p["B"] @ p["B"].T, c**2 * minor @ minor.T) < 1e-3


def test_lora_ga_draws_disjoint_directions(model):
    data = calibration(model)
    U, _, Vh = torch.linalg.svd(gradient(model, data))
    cfg = lf.LoRAGA(r=R, direction="random", scale_by="unit")
    p = leaves(lf.init(model, cfg, data=data, loss_fn=loss_fn))
    of_A = (p["A"] @ Vh.T).abs().argmax(1)
    of_B = (U.T @ p["B"]).abs().argmax(0)
    assert {*of_A.tolist(), *of_B.tolist()} == {*range(2 * R)}


def test_lora_ga_refuses(model):
    data = calibration(model)
    with pytest.raises(ValueError, match="r = 11 needs 2r directions, the weight has 20"):
        lf.init(model, lf.LoRAGA(r=11), data=data, loss_fn=loss_fn)
    with pytest.raises(ValueError, match="the gradient is zero"):
        lf.init(model, lf.LoRAGA(r=2), data=data, loss_fn=lambda y, _: 0 * y.sum())
    with pytest.raises(ValueError, match="scale_by: got 'none'"):
        lf.LoRAGA(scale_by="none")


@pytest.mark.parametrize("step", [True, False])
def test_lora_one_is_a_step_along_the_gradient(model, step):
    data = calibration(model, batches=2)
    params = lf.init(model, lf.LoRAOne(r=R, step=step), data=data, loss_fn=loss_fn)
    U, singular, Vh = torch.linalg.svd(gradient(model, data))
    expected = -(U[:, :R] * singular[:R]) @ Vh[:R] / (128 * singular[0])
    p = leaves(params)
    assert relative(p["B"] @ p["A"], expected) < 1e-4
    x = data[0]
    assert torch.equal(lf.fcall(model, params, x), model(x)) is not step


def test_the_scale_of_lora_one_falls_with_the_root_of_the_rank():
    assert lf.LoRAOne(r=16, alpha=16).scale == 4
    assert lf.LoRAOne().scale == 16 / math.sqrt(8)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_mica_is_pefts(shape):
    d_in, d_out = shape
    model = nn.Sequential(nn.Linear(d_in, d_out))
    config = peft.LoraConfig(r=R, init_lora_weights="mica", target_modules=["0"])
    layer = peft.get_peft_model(copy.deepcopy(model), config).base_model.model[0]
    B, theirs = leaves(lf.init(model, lf.MiCA(r=R)))["_B"], layer.lora_B["default"].weight
    assert relative(B @ B.T, theirs @ theirs.T) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parity_of_mica_with_peft(dtype):
    assert_parity(
        lf.MiCA(r=R, alpha=ALPHA),
        peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"]),
        lambda layer: {"A": (layer.lora_A["default"].weight, same)},
        constants=lambda layer: {"_B": layer.lora_B["default"].weight.data.normal_()},
        dtype=dtype,
    )


def test_the_gaussian_start_has_pefts_spread():
    model = nn.Sequential(nn.Linear(4000, 8))
    p = leaves(lf.init(model, lf.LoRA(r=8, start="gaussian")))
    assert not p["B"].any()
    assert p["A"].std().item() == pytest.approx(1 / 8, rel=0.05)


def test_the_orthogonal_start_has_two_factors_whose_product_is_zero():
    model = nn.Sequential(nn.Linear(400, 300))
    p = leaves(lf.init(model, lf.LoRA(r=8, start="orthogonal"), dtype=torch.float64))
    assert (p["B"] @ p["A"]).abs().max() < 1e-15
    config = peft.LoraConfig(r=8, init_lora_weights="orthogonal", target_modules=["0"])
    layer = peft.get_peft_model(model, config).base_model.model[0]
    for ours, theirs in ((p["A"], layer.lora_A), (p["B"], layer.lora_B)):
        assert torch.linalg.matrix_rank(ours) == 4
        assert ours.std().item() == pytest.approx(theirs["default"].weight.std().item(), rel=0.15)
    with pytest.raises(ValueError, match="r: got 3; the start 'orthogonal' needs an even r"):
        lf.LoRA(r=3, start="orthogonal")
