"""The template is a working variant, and the laws run on it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_func as lf
from lora_func.testing import Case
from lora_func.variants._template import Template


def test_formula():
    layer = Case("template", lambda r: Template(r=r)).layer(scrambled=True)
    A, B, g = (layer.leaves[leaf] for leaf in ("A", "B", "g"))
    W, b = layer.module.weight, layer.module.bias
    torch.testing.assert_close(layer.apply(), F.linear(layer.x, W + B @ torch.diag(g) @ A, b))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"g_initial": 0}, "g_initial: got 0, at which"), ({"g_initial": "1"}, "g_initial: got '1'")],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        Template(**settings)


def test_a_registered_variant_works_like_a_built_in_one(tmp_path):
    model, x = nn.Sequential(nn.Linear(3, 3)).requires_grad_(False), torch.ones(2, 3)
    each = [lf.init(model, Template(r=r, g_initial=0.5), seed=r) for r in (1, 2)]
    stack = lf.stack(each)
    assert lf.vcall(model, stack, x).shape == (2, 2, 3)
    lf.save(stack, tmp_path / "stack.safetensors", model=model)
    assert lf.load(tmp_path / "stack.safetensors", model=model).keys() == stack.keys()
    total = lf.combine([(each[0], 1.0), (each[1], -2.0)])
    assert {key.split(".")[1] for key in total} == {"lora"}
    assert lf.to_lora(each[1], model, rank=2).errors["0"] == 0
    merged = nn.Sequential(nn.Linear(3, 3))
    merged.load_state_dict(lf.merge(model, each[1]))
    torch.testing.assert_close(merged(x), lf.fcall(model, each[1], x))
