"""WaveFT compared with its formula and with PEFT."""

import sys

import peft
import pytest
import pywt
import torch
from hypothesis import given
from hypothesis import strategies as st

import lora_func as lf
from lora_func.peft import to_peft
from lora_func.testing import Case, layers
from lora_func.variants.waveft import PEFT_WAVELETS, WAVELETS
from tests.support.parity import assert_parity, same


def case(wavelet):
    def fit(d_in, d_out, r):
        return 2 * d_in, 2 * d_out, min(r, 4 * d_in * d_out)

    return Case("waveft", lambda r: lf.WaveFT(n_frequency=r, wavelet=wavelet), fit=fit)


def synthesised(layer):
    """One level of PyWavelets' inverse transform, of coefficients in PEFT's bands."""
    indices, c, (d_out, d_in) = (
        layer.leaves["_indices"],
        layer.leaves["spectrum"],
        layer.module.weight.shape,
    )
    C = torch.zeros(d_out, d_in, dtype=c.dtype)
    C[tuple(indices.long())] = c.detach()
    (a, across), (down, both) = (row.chunk(2, 1) for row in C.chunk(2, 0))
    # PEFT calls the upper right band the horizontal one
    made = pywt.idwt2((a.numpy(), (across.numpy(), down.numpy(), both.numpy())), "db1")
    return layer.module.weight + 25 * torch.from_numpy(made)


@given(data=st.data())
def test_formula(data):
    layer = data.draw(layers(case("db1"), scrambled=True))
    torch.testing.assert_close(layer.weight(), synthesised(layer))


def test_even_sizes_keep_the_norm():
    layer = case("db1").layer(d_in=4, d_out=3, r=24, scrambled=True)
    change = layer.weight() - layer.module.weight
    torch.testing.assert_close(change.norm(), 25 * layer.leaves["spectrum"].norm())
    one = layer.with_leaves({"spectrum": torch.eye(24, dtype=torch.float64)[5]})
    assert ((one.weight() - layer.module.weight).abs() > 1e-9).sum() == 4


def test_entries_of_the_weight_itself():
    layer = case(None).layer(d_in=4, d_out=3, r=7, scrambled=True)
    expected = layer.module.weight.detach().clone()
    expected[tuple(layer.leaves["_indices"].long())] += 25 * layer.leaves["spectrum"].detach()
    torch.testing.assert_close(layer.weight(), expected)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_filters_are_orthonormal(wavelet):
    W = torch.zeros(4, 4)
    leaves = lf.variants.waveft.init(W, lf.WaveFT(n_frequency=3, wavelet=wavelet), None)
    assert abs(leaves["_filter"].square().sum() - 1) < 1e-7
    assert abs(leaves["_filter"].sum() - 2**0.5) < 1e-7


def test_unknown_wavelets_are_refused():
    with pytest.raises(ValueError, match="wavelet: got 'haar', expected None or one of db1"):
        lf.WaveFT(wavelet="haar")


def test_pywavelets_is_named_where_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "pywt", None)
    model = torch.nn.Sequential(torch.nn.Linear(60, 50))
    lf.init(model, lf.WaveFT())
    with pytest.raises(ImportError, match=r"pip install 'lora_func\[wavelets\]'"):
        lf.init(model, lf.WaveFT(wavelet="db2"))


def test_filters_of_no_wavelet_are_not_written(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(5, 4))
    params = lf.init(model, lf.WaveFT(n_frequency=6))
    with pytest.raises(ValueError, match="its 2 taps are those of no wavelet"):
        to_peft({**params, "0.waveft._filter": torch.ones(2)}, tmp_path, model=model)


@pytest.mark.parametrize("wavelet", ["db1", "db4", "sym8", "coif2", None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parity_with_peft(wavelet, bias, dtype):
    family = {"use_idwt": False} if wavelet is None else {"wavelet_family": wavelet}
    assert_parity(
        lf.WaveFT(n_frequency=20, scaling=3.0, wavelet=wavelet),
        peft.WaveFTConfig(n_frequency=20, scaling=3.0, target_modules=["0"], **family),
        lambda layer: {"spectrum": (layer.waveft_spectrum["default"], same)},
        bias=bias,
        dtype=dtype,
    )


@pytest.mark.parametrize("wavelet", PEFT_WAVELETS)
@pytest.mark.parametrize("shape", [(9, 8), (16, 5)])
def test_every_wavelet_is_that_of_peft(wavelet, shape):
    cfg = peft.WaveFTConfig(
        n_frequency=30, wavelet_family=wavelet, target_modules=["0"], init_weights=False
    )
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(*shape)), cfg)
    layer = model.base_model.model[0]
    W = torch.zeros(shape[::-1])
    leaves = lf.variants.waveft.init(W, lf.WaveFT(n_frequency=30, wavelet=wavelet), None)
    leaves["spectrum"] = layer.waveft_spectrum["default"]
    ours = lf.variants.waveft.VARIANT.weight(W, leaves)
    torch.testing.assert_close(ours, layer.get_delta_weight("default"), atol=1e-5, rtol=1e-5)
