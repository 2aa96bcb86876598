"""BD-LoRA compared with block-diagonal factors and with PEFT, also through checkpoints."""

import json

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn

import lora_func as lf
from lora_func.peft import from_peft, to_peft
from lora_func.testing import Case, layers
from tests.support.models import scramble
from tests.support.parity import assert_parity, same

CASES = [
    Case(
        f"bdlora-{side}",
        lambda r, side=side: lf.BDLoRA(r=3 * r, side=side, blocks=3, alpha=2.0),
        fit=lambda d_in, d_out, r: (3 * d_in, 3 * d_out, r),
    )
    for side in "AB"
]


@given(data=st.data(), case=st.sampled_from(CASES))
def test_formula(data, case):
    layer = data.draw(layers(case, scrambled=True))
    factors = {name: layer.leaves[name] for name in "AB"}
    side = case.name[-1]
    factors[side] = torch.block_diag(*factors[side].chunk(3))
    change = layer.leaves["_scale"] * factors["B"] @ factors["A"]
    torch.testing.assert_close(layer.weight(), layer.module.weight + change)
    norm = layer.variant.delta_norm(layer.leaves, (*layer.module.weight.shape,))
    torch.testing.assert_close(norm, change.norm(), rtol=1e-6, atol=1e-9)


def config(side, **settings):
    names = {f"target_modules_bd_{side.lower()}": ["0"]}
    return peft.LoraConfig(
        lora_alpha=2 * settings["r"],
        target_modules=["0"],
        use_bdlora=peft.tuners.lora.config.BdLoraConfig(nblocks=4, **names),
        **settings,
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("side", ["A", "B"])
def test_parity_with_peft(side, bias, dtype):
    assert_parity(
        lf.BDLoRA(r=8, side=side, blocks=4),
        config(side, r=8),
        lambda layer: {
            "A": (layer.lora_A["default"].weight, same),
            "B": (layer.lora_B["default"].weight, same),
        },
        bias=bias,
        dtype=dtype,
    )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.other = nn.Linear(8, 8)

    def forward(self, x):
        return self.other(self.down(self.up(x).relu()))


SPLIT = [
    lf.BDLoRA(r=4, side="B", blocks=4, target_modules="up"),
    lf.BDLoRA(r=4, side="A", blocks=4, target_modules="down"),
]


@pytest.mark.parametrize("with_lora", [False, True])
def test_both_sides_in_one_checkpoint(with_lora, tmp_path):
    model, x = Block(), torch.randn(3, 8)
    configs = [*SPLIT, lf.LoRA(r=4, target_modules="other")] if with_lora else SPLIT
    params = scramble(lf.init(model, configs))
    to_peft(params, tmp_path, model=model)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())["use_bdlora"]
    names = {"target_modules_bd_a": ["down"], "target_modules_bd_b": ["up"]}
    assert stored == {"nblocks": 4, "match_strict": False, **names}
    expected = lf.fcall(model, params, x)
    read = from_peft(tmp_path, model)
    assert read.keys() == params.keys()
    torch.testing.assert_close(lf.fcall(model, read, x), expected)
    theirs = PeftModel.from_pretrained(model, tmp_path).eval()
    torch.testing.assert_close(theirs(x), expected, rtol=1e-5, atol=1e-6)


def test_sites_that_peft_would_confuse_are_refused(tmp_path):
    model = nn.ModuleDict({"a": nn.ModuleDict({"up": nn.Linear(8, 8)}), "up_too": nn.Linear(8, 8)})
    configs = [
        lf.BDLoRA(r=4, side="A", target_modules=r"a\.up"),
        lf.BDLoRA(r=4, side="B", target_modules="up_too"),
    ]
    with pytest.raises(ValueError, match=r"up_too: PEFT would find it by use_bdlora.*rename"):
        to_peft(lf.init(model, configs), tmp_path, model=model)
    assert not [*tmp_path.iterdir()]


def test_blocks_that_differ_are_refused(tmp_path):
    model = Block()
    configs = [SPLIT[0], lf.BDLoRA(r=4, side="A", blocks=2, target_modules="down")]
    with pytest.raises(ValueError, match="nblocks is 2, elsewhere 4; PEFT has one"):
        to_peft(lf.init(model, configs), tmp_path, model=model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": "C"}, "side: got 'C', expected one of 'A', 'B'"),
        ({"blocks": 3}, "blocks: got 3, which does not divide r = 8"),
        ({"blocks": 0}, "blocks: got 0, expected an integer of at least 1"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.BDLoRA(**{"r": 8} | settings)


@pytest.mark.parametrize(("side", "name"), [("A", "d_in = 6"), ("B", "d_out = 10")])
def test_refuses_a_width_that_the_blocks_do_not_divide(side, name):
    with pytest.raises(ValueError, match=f"blocks = 4 does not divide {name}"):
        lf.init(nn.Sequential(nn.Linear(6, 10)), lf.BDLoRA(r=4, side=side, blocks=4))
