"""Which sites a config selects, and the errors if it selects none."""

import logging
import sys

import pytest
import torch
from torch import nn
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwinConfig,
    SwinModel,
    T5Config,
    T5ForConditionalGeneration,
)

import lora_func as lf
from tests.support.models import bert, gpt2, qwen3


def sites(model, cfg):
    return [target.site for target in lf.find_targets(model, cfg)]


def endings(model, **settings):
    return [site.split(".", 3)[-1] for site in sites(model, lf.LoRA(layers=0, **settings))]


def tiny_t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "vocab_size": 64}
    return T5ForConditionalGeneration(T5Config(num_layers=2, num_decoder_layers=3, **sizes))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.mid, self.down = nn.Linear(width, 20), nn.Linear(20, 20), nn.Linear(20, width)
        self.norm = nn.LayerNorm(width)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def plain(width=8, depth=3):
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(10, width),
            "blocks": nn.ModuleList(Block(width) for _ in range(depth)),
            "head": nn.Linear(width, 10),
        }
    )


def test_a_regular_expression_is_searched():
    found = lf.find_targets(qwen3(), lf.LoRA(target_modules=r"(q|v)_proj$"))
    assert [(t.site, t.pattern, t.layer) for t in found] == [
        ("model.layers.0.self_attn.q_proj", r"(q|v)_proj$", 0),
        ("model.layers.0.self_attn.v_proj", r"(q|v)_proj$", 0),
        ("model.layers.1.self_attn.q_proj", r"(q|v)_proj$", 1),
        ("model.layers.1.self_attn.v_proj", r"(q|v)_proj$", 1),
    ]
    assert len(found) == 4
    assert found.left_out == {}


def test_a_sequence_says_which_pattern_matched_first():
    cfg = lf.LoRA(
        target_modules=["down_proj", r"layers\.0.*proj"], layers=0, exclude_modules="attn"
    )
    assert [(t.site.rpartition(".")[2], t.pattern) for t in lf.find_targets(qwen3(), cfg)] == [
        ("gate_proj", r"layers\.0.*proj"),
        ("up_proj", r"layers\.0.*proj"),
        ("down_proj", "down_proj"),
    ]


@pytest.mark.parametrize(
    ("model", "count", "left_out"),
    [
        (qwen3, 14, {"lm_head": "output head"}),
        (gpt2, 8, {"lm_head": "output head"}),
        (bert, 13, {"classifier": "output head"}),
        (tiny_t5, 2 * 6 + 3 * 10, {"lm_head": "output head"}),
        (plain, 22, {}),
    ],
)
def test_all_linear_leaves_out_the_output_head_and_says_so(model, count, left_out, caplog):
    with caplog.at_level(logging.INFO, "lora_func"):
        found = lf.find_targets(model(), lf.LoRA())
    assert len(found) == count
    assert found.left_out == left_out
    assert all(path in caplog.text for path in left_out)
    assert {target.pattern for target in found} == {"all-linear"}


def test_all_linear_and_a_pattern_for_what_it_leaves_out():
    found = lf.find_targets(qwen3(), lf.LoRA(target_modules=["all-linear", "lm_head"]))
    assert found.sites[-1] == ("lm_head", "lm_head", None, ())
    assert len(found) == 15
    assert found.left_out == {}


class Router(nn.Module):
    """An older mixture of experts, where the router is a linear layer."""

    def __init__(self, name):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.gate_proj = nn.Linear(8, 8)
        setattr(self, name, nn.Linear(8, 2))


@pytest.mark.parametrize("name", ["gate", "router", "shared_expert_gate"])
def test_all_linear_leaves_out_routers(name):
    found = lf.find_targets(Router(name), lf.LoRA(r=1))
    assert found.left_out == {name: "MoE router"}
    assert [t.site for t in found] == ["experts.0", "experts.1", "gate_proj"]


@pytest.mark.parametrize(
    "kind", [(MixtralConfig, MixtralForCausalLM), (Qwen3MoeConfig, Qwen3MoeForCausalLM)]
)
def test_all_linear_on_mixtures_of_experts(kind):
    config, model = kind
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    found = sites(model(config(num_attention_heads=2, num_key_value_heads=2, **sizes)), lf.LoRA())
    assert {site.rpartition(".")[2] for site in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [(1, {1}), ((0, 2), {0, 2}), (-1, {2}), ([-3, 1], {0, 1}), (range(2), {0, 1})],
)
def test_layers(layers, blocks):
    found = lf.find_targets(plain(), lf.LoRA(layers=layers))
    assert {target.layer for target in found} == blocks
    assert len(found) == 7 * len(blocks)


def test_layers_count_from_the_end_of_each_stack():
    found = sites(tiny_t5(), lf.LoRA(target_modules=r"\.q$", layers=-1))
    assert [site.split(".layer.")[0] for site in found] == [
        "encoder.block.1",
        *["decoder.block.2"] * 2,
    ]


def test_layers_of_trained_parameters():
    cfg = lf.Full(target_parameters=r"norm\.", layers=-1)
    assert lf.find_targets(plain(), cfg).sites == (
        ("blocks.2.norm", r"norm\.", 2, ("weight", "bias")),
    )


@pytest.mark.parametrize(
    ("model", "readers", "writers", "inner"),
    [
        (
            qwen3,
            ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
            ["o_proj", "down_proj"],
            [],
        ),
        (gpt2, ["c_attn", "c_fc"], ["c_proj", "c_proj"], []),
        (plain, ["q", "k", "v", "up"], ["o", "down"], ["mid"]),
        (
            tiny_t5,
            ["q", "k", "v", "wi"] + ["q", "k", "v"] * 2 + ["wi"],
            ["o", "wo", "o", "o", "wo"],
            [],
        ),
    ],
)
def test_roles(model, readers, writers, inner):
    model = model()
    for role, expected in (("reader", readers), ("writer", writers), ("inner", inner)):
        cfg = lf.LoRA(target_roles=role, layers=0)
        if expected:
            assert [site.rpartition(".")[2] for site in sites(model, cfg)] == expected, role
        else:
            with pytest.raises(ValueError, match=rf"target_roles: no \['{role}'\] among"):
                sites(model, cfg)


def test_roles_of_bert():
    assert endings(bert(), target_roles="reader") == [
        "0.attention.self.query",
        "0.attention.self.key",
        "0.attention.self.value",
        "0.intermediate.dense",
    ]
    assert endings(bert(), target_roles="writer") == ["0.attention.output.dense", "0.output.dense"]


def test_roles_of_torchs_own_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    writers = sites(model, lf.LoRA(target_roles="writer", layers=0))
    assert writers == ["layers.0.self_attn.out_proj", "layers.0.linear2"]
    assert sites(model, lf.LoRA(target_roles="reader", layers=0)) == ["layers.0.linear1"]


def test_roles_of_an_output_projection_that_is_defined_first():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    model = Phi3ForCausalLM(Phi3Config(num_attention_heads=4, pad_token_id=0, **sizes))
    assert endings(model, target_roles="writer") == ["self_attn.o_proj", "mlp.down_proj"]
    assert endings(model, target_roles="reader") == ["self_attn.qkv_proj", "mlp.gate_up_proj"]


def test_roles_where_the_width_changes_between_stages():
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "window_size": 2}
    model = SwinModel(SwinConfig(depths=[1, 1], num_heads=[2, 2], **sizes))
    for stage in ("layers.0.blocks", "layers.1.blocks"):
        found = sites(model, lf.LoRA(r=2, target_roles="writer", target_modules=stage))
        assert [site.split(".blocks.0.")[1] for site in found] == ["attention.o_proj", "mlp.fc2"]


def test_roles_of_a_gate_between_reader_and_writer():
    key, gate, value = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(16, 8)
    feed = nn.ModuleDict({"key": key, "gate": gate, "value": value})
    model = nn.ModuleList([nn.ModuleDict({"norm": nn.LayerNorm(8), "feed": feed})])
    assert sites(model, lf.LoRA(r=2, target_roles="writer")) == ["0.feed.value"]


def test_the_head_of_a_model_inside_another():
    model = nn.ModuleDict({"lm": qwen3(), "classifier": bert()})
    left_out = lf.find_targets(model, lf.LoRA(r=2)).left_out
    assert left_out == {"lm.lm_head": "output head", "classifier.classifier": "output head"}


def test_what_is_no_stack_of_layers():
    model = plain()
    model["head"] = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    found = lf.find_targets(model, lf.LoRA(r=2, layers=-1))
    assert {target.site.split(".")[0] for target in found} == {"blocks"}
    model["head"] = nn.Sequential(nn.Linear(8, 2))
    assert {s.split(".")[0] for s in sites(model, lf.LoRA(r=2, layers=0))} == {"blocks"}
    alike = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert sites(alike, lf.LoRA(layers=-1)) == ["1"]


def test_layers_left_out_are_not_refused():
    model = nn.ModuleList([nn.Linear(4, 4), Doubling(4, 4)])
    assert sites(model, lf.LoRA(target_modules=r"\d", layers=0)) == ["0"]


def test_roles_outside_any_block():
    assert "bert.pooler.dense" in sites(bert(), lf.LoRA(target_roles="reader"))
    one = nn.Linear(8, 8)
    assert sites(one, lf.LoRA(target_roles="reader")) == [""]
    two = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    assert sites(two, lf.LoRA(target_roles="writer")) == ["2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": "q_prj$"},
            r"target_modules: 'q_prj\$' matches no site; nearest are .*q_proj",
        ),
        (
            {"target_modules": ["q_proj", "qproj"]},
            "target_modules: 'qproj' matches no site; nearest are .*q_proj",
        ),
        (
            {"target_modules": "norm"},
            r"'norm' matches no site, but .*norm \(a transformers.*Qwen3RMSNorm\)",
        ),
        (
            {"exclude_modules": "lmhead"},
            "exclude_modules: 'lmhead' matches no site; nearest are lm_head",
        ),
        (
            {"exclude_modules": "."},
            "target_modules: 'all-linear' less '.' leaves none of the model's 15",
        ),
        (
            {"rank_pattern": {"q_porj": 4}},
            "rank_pattern: 'q_porj' matches no site; nearest are .*q_proj",
        ),
        ({"alpha_pattern": {"lm_head": 4.0}}, "alpha_pattern: 'lm_head' matches no site"),
        (
            {"target_modules": ["q_proj", "lm_head"], "layers": 0},
            r"target_modules: 'lm_head' matches no site, but lm_head \(left out by exclude_modules",
        ),
        (
            {"target_modules": ["q_proj", "v_proj"], "exclude_modules": "v_"},
            r"target_modules: 'v_proj' matches no site, but .*v_proj \(left out by exclude_modules",
        ),
        ({"layers": 5}, r"layers: no site in layer 5; there are sites in layers \[0, 1\]"),
        ({"layers": [0, -3]}, "layers: no site in layer -3"),
        ({"layers": []}, "layers: got an empty sequence"),
        ({"target_modules": []}, 'target_modules: got no pattern; "all-linear"'),
        ({"target_modules": "["}, r"target_modules: '\[' is no regular expression"),
        ({"exclude_modules": "["}, r"exclude_modules: '\[' is no regular expression"),
        (
            {"target_roles": "writr"},
            r"target_roles: got 'writr', expected any of \('reader', 'writer', 'inner'\)",
        ),
        ({"target_roles": ("writer", "inner")}, r"target_roles: no \['inner'\] among"),
    ],
)
def test_what_matches_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        lf.init(qwen3(), lf.LoRA(**settings))


@pytest.mark.parametrize(
    ("make_cfg", "message"),
    [
        (lambda: lf.LoRA(layers="0"), "layers: got '0', expected an int"),
        (lambda: lf.LoRA(layers=[True]), "layers: got True, expected an int"),
        (
            lambda: lf.LoRA(target_modules=[1]),
            "target_modules: got 1, expected a regular expression",
        ),
        (lambda: "q_proj", "'q_proj' is no adapter config; expected one of .*Full, .*LoRA"),
        (lambda: lf.LowRankConfig(), "is no adapter config"),
    ],
)
def test_what_is_no_config_is_refused(make_cfg, message):
    with pytest.raises(TypeError, match=message):
        lf.find_targets(qwen3(), make_cfg())


def test_a_linear_layer_with_a_forward_of_its_own_is_never_replaced():
    model = nn.Sequential(nn.Linear(4, 4), Doubling(4, 4))
    found = lf.find_targets(model, lf.LoRA())
    assert [t.site for t in found] == ["0"]
    assert "Doubling has its own forward" in found.left_out["1"]
    with pytest.raises(TypeError, match=r"1: .*Doubling has its own forward.*exclude_modules"):
        lf.init(model, lf.LoRA(target_modules=r"\d"))


def test_parametrized_layers_are_sites():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    x = torch.randn(2, 4)
    params = lf.init(model, lf.LoRA(r=2))
    assert torch.equal(lf.fcall(model, params, x), model(x))


def calls_of(function):
    """The number of Python function calls that a function makes."""
    count = 0

    def note(frame, event, _):
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


class Stack(nn.Module):
    def __init__(self, layers):
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(layers))
        self.layers = nn.ModuleList(blocks)


@pytest.mark.parametrize(
    "cfg",
    [
        lf.LoRA(r=1),
        lf.LoRA(r=1, target_modules=(), target_parameters="weight"),
        lf.LoRA(r=1, target_roles="reader"),
        lf.LoRA(r=1, layers=(0, -1)),
        lf.Full(target_parameters=".*"),
    ],
)
def test_init_is_linear_in_the_number_of_layers(cfg):
    models = {layers: Stack(layers) for layers in (20, 80)}
    lf.init(models[20], cfg)
    counts = {n: calls_of(lambda m=m: lf.init(m, cfg)) for n, m in models.items()}
    assert counts[80] < 5 * counts[20]


def test_all_linear_leaves_out_what_is_only_read():
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**sizes)).eval()
    found = lf.find_targets(model, lf.LoRA(r=1))
    assert "never calls it" in found.left_out["backbone.layers.0.mixer.dt_proj"]
    ids = torch.arange(3, 9)[None]
    lf.fcall(model, lf.init(model, lf.LoRA(r=1)), {"input_ids": ids})
    params = lf.init(model, lf.LoRA(r=1, target_modules="conv1d|dt_proj"))
    with pytest.raises(lf.UnusedLeafError, match="no part"), lf.adapted(model, params):
        model(input_ids=ids)
