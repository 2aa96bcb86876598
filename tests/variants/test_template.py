"""The template is a working variant; the laws run on it as one of the cases."""

import torch
import torch.nn.functional as F
from torch import nn

import lora_func as lf
from lora_func.variants._template import Template
from tests.support.cases import Case, make_layer


def test_formula():
    layer = make_layer(Case("template", lambda r: Template()), scrambled=True)
    g = 1 + layer.leaves["g"]
    W, b = layer.module.weight, layer.module.bias
    torch.testing.assert_close(layer.apply(), F.linear(layer.x, g[:, None] * W, g * b))


def test_a_registered_variant_works_like_our_own():
    model = nn.Sequential(nn.Linear(3, 3))
    assert list(lf.init(model, Template(start=0.5))) == ["0.template.g"]
