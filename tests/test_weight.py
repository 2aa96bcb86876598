"""The weight interface: every layer type gives a (d_out, d_in) weight."""

import pytest
import torch
from hypothesis import given
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_func.testing import dims
from lora_func.weights import Affine, affine, dense, is_linear, linear


@given(d_in=dims, d_out=dims)
def test_conv1d_is_a_linear_layer_transposed(d_in, d_out):
    layer, x = Conv1D(d_out, d_in), torch.randn(3, d_in)
    nn.init.normal_(layer.bias)
    W = affine(layer)
    assert W.shape == (d_out, d_in)
    assert torch.equal(linear(x, W), layer(x))
    assert W.weight.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    layer, x = nn.Linear(4, 3, bias=bias), torch.randn(2, 4)
    W = affine(layer)
    assert torch.equal(linear(x, W), layer(x))
    assert dense(W) is layer.weight
    assert W.bias is layer.bias
    assert dense(layer.weight) is layer.weight
    assert (W.shape, W.device) == ((3, 4), layer.weight.device)
    assert torch.equal(linear(x, Affine(layer.weight)), linear(x, layer.weight))


def test_what_is_linear():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Named(nn.Linear):
        pass

    assert is_linear(nn.Linear(2, 2))
    assert is_linear(Named(2, 2))
    assert is_linear(Conv1D(2, 2))
    assert not is_linear(Scaled(2, 2))
    assert not is_linear(nn.Conv1d(2, 2, 1))
    assert not is_linear(nn.Bilinear(2, 2, 2))
