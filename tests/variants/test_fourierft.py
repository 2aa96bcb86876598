"""FourierFT compared with its formula and with PEFT."""

import math

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lora_func as lf
from lora_func.peft import to_peft
from lora_func.testing import Case, layers
from tests.support.cases import LOCATED
from tests.support.parity import assert_parity, same

CASE = Case("fourierft", lambda r: lf.FourierFT(n_frequency=4 + r, scaling=7.0), **LOCATED)


@given(data=st.data())
def test_formula(data):
    layer = data.draw(layers(CASE, scrambled=True))
    p, W = layer.leaves, layer.module.weight
    spectrum = torch.zeros_like(W)
    spectrum[tuple(p["_indices"].long())] = p["spectrum"].detach()
    torch.testing.assert_close(layer.weight(), W + 7 * torch.fft.ifft2(spectrum).real)


def test_the_sum_of_the_change_is_the_constant_frequency():
    every = Case("fourierft", lambda r: lf.FourierFT(n_frequency=12, scaling=7.0))
    layer = every.layer(d_in=4, d_out=3, r=1, scrambled=True)
    p = layer.leaves
    constant = (p["_indices"] == 0).all(0).nonzero().item()
    change = layer.weight() - layer.module.weight
    torch.testing.assert_close(change.sum(), 7 * p["spectrum"][constant])


@pytest.mark.parametrize("shape", [(6, 8), (7, 9), (1, 8), (8, 1)])
def test_one_frequency_is_a_wave(shape):
    W, (d_out, d_in) = torch.zeros(shape, dtype=torch.float64), shape
    leaves = {
        "spectrum": torch.ones(1, dtype=torch.float64),
        "_indices": torch.tensor([[d_out - 1], [d_in // 2]]),
        "_seed": torch.tensor(0),
        "_scale": torch.tensor(d_out * d_in, dtype=torch.float64),
    }
    p, q = torch.meshgrid(*(torch.arange(n).double() for n in shape), indexing="ij")
    angle = 2 * math.pi * (p * ((d_out - 1) / d_out) + q * ((d_in // 2) / d_in))
    change = lf.variants.fourierft.VARIANT.weight(W, leaves)
    torch.testing.assert_close(change, angle.cos(), atol=1e-9, rtol=0)


def test_weights_of_one_shape_share_their_places():
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 5) for _ in range(2)))
    params = lf.init(model, lf.FourierFT(n_frequency=9))
    first, second = (params[f"{site}.fourierft._indices"] for site in "01")
    assert torch.equal(first, second)


def test_too_many_frequencies_are_refused():
    with pytest.raises(ValueError, match=r"0: fourierft: n_frequency: got 21, .* 20 entries"):
        lf.init(torch.nn.Sequential(torch.nn.Linear(5, 4)), lf.FourierFT(n_frequency=21))


@pytest.mark.parametrize("field", [{"sigma": -1.0}, {"n_frequency": 0}, {"scaling": math.inf}])
def test_settings_are_checked(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        lf.FourierFT(**field)


def test_places_that_peft_would_not_draw_are_not_written(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(5, 4))
    params = lf.init(model, lf.FourierFT(n_frequency=6))
    moved = {**params, "0.fourierft._indices": params["0.fourierft._indices"].flip(-1)}
    with pytest.raises(ValueError, match="PEFT draws other places from the seed 777"):
        to_peft(moved, tmp_path, model=model)


@pytest.mark.parametrize("bias", [True, False])
def test_parity_with_peft(bias):
    assert_parity(
        lf.FourierFT(n_frequency=20, scaling=3.0),
        peft.FourierFTConfig(n_frequency=20, scaling=3.0, target_modules=["0"]),
        lambda layer: {"spectrum": (layer.fourierft_spectrum["default"], same)},
        bias=bias,
        dtype=torch.float32,  # PEFT transforms in float32
    )
