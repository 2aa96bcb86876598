"""PEFT checkpoints of every kind of layer: read, written again, compared with PEFT's numbers."""

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import lora_func as lf
from lora_func.peft import from_peft, to_peft
from tests.support.models import SIZES, scramble


def image(channels=4):
    return torch.randn(2, channels, 6, 6)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.mha = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        h = self.before(x)
        return self.mha(h, h, h, need_weights=False)[0]


class Experts(nn.Module):
    """Stacked weights (n, d_out, d_in), and a matrix that is no layer."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 4)), nn.Parameter(torch.randn(3, 4, 6))
        self.mix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        h = torch.einsum("bi,noi->bno", x @ self.mix.T, self.up).relu()
        return torch.einsum("bno,nio->bi", h, self.down)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.experts = nn.Linear(4, 4), Experts()

    def forward(self, x):
        return self.experts(self.before(x))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x):
        return self.head(self.b(self.norm(self.a(x)).relu()))


def conv(kind=nn.Conv2d, kernel=3, **settings):
    return lambda: nn.Sequential(kind(4, 6, kernel, **settings), nn.ReLU(), kind(6, 4, kernel))


def words():
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4))


LORA, DORA = {"r": 2}, {"r": 2, "use_dora": True}
ALL = ["0", "2"]
TABLE = {
    "conv1d lora": (conv(nn.Conv1d), peft.LoraConfig(**LORA, target_modules=ALL), (2, 4, 8)),
    "conv2d lora": (conv(padding=1), peft.LoraConfig(**LORA, target_modules=ALL), (2, 4, 8, 8)),
    "conv2d dora": (conv(stride=2), peft.LoraConfig(**DORA, target_modules=ALL), (2, 4, 9, 9)),
    "conv3d lora": (conv(nn.Conv3d), peft.LoraConfig(**LORA, target_modules=ALL), (2, 4, 6, 6, 6)),
    "conv2d ia3": (
        conv(),
        peft.IA3Config(target_modules=ALL, feedforward_modules=["2"]),
        (2, 4, 8, 8),
    ),
    "conv2d groups ia3": (
        conv(groups=2),
        peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
        (2, 4, 8, 8),
    ),
    "conv1d loha": (conv(nn.Conv1d), peft.LoHaConfig(r=2, target_modules=ALL), (2, 4, 8)),
    "conv2d loha": (conv(padding=1), peft.LoHaConfig(r=2, target_modules=ALL), (2, 4, 8, 8)),
    "conv2d groups loha": (
        conv(groups=2),
        peft.LoHaConfig(r=2, target_modules=["0"]),
        (2, 4, 8, 8),
    ),
    "conv1d lokr": (conv(nn.Conv1d), peft.LoKrConfig(r=1, target_modules=ALL), (2, 4, 8)),
    "conv2d lokr": (conv(padding=1), peft.LoKrConfig(r=2, target_modules=ALL), (2, 4, 8, 8)),
    "conv2d groups lokr": (
        conv(groups=2),
        peft.LoKrConfig(target_modules=["0"], decompose_both=True, r=1),
        (2, 4, 8, 8),
    ),
    "conv2d lora bias": (
        conv(padding=1),
        peft.LoraConfig(r=2, target_modules=ALL, lora_bias=True),
        (2, 4, 8, 8),
    ),
    "conv1d hira": (conv(nn.Conv1d), peft.HiraConfig(r=2, target_modules=ALL), (2, 4, 8)),
    "conv3d hira": (conv(nn.Conv3d), peft.HiraConfig(r=2, target_modules=ALL), (2, 4, 6, 6, 6)),
    "conv2d boft": (
        conv(padding=1),
        peft.BOFTConfig(boft_block_size=3, target_modules=ALL),
        (2, 4, 8, 8),
    ),
    "a table and a layer hira": (
        words,
        peft.HiraConfig(r=2, target_modules=["0", "1"]),
        "ids",
    ),
    "conv2d hra": (conv(padding=1), peft.HRAConfig(r=2, target_modules=ALL), (2, 4, 8, 8)),
    "conv2d oft": (
        conv(kernel=1),
        peft.OFTConfig(oft_block_size=2, target_modules=ALL),
        (2, 4, 8, 8),
    ),
    "oft shared": (
        Mlp,
        peft.OFTConfig(oft_block_size=2, target_modules=["a", "b"], block_share=True),
        (5, 6),
    ),
    "oft constrained": (
        Mlp,
        peft.OFTConfig(oft_block_size=2, target_modules=["a", "b"], coft=True, eps=0.3),
        (5, 6),
    ),
    "hra orthonormal": (Mlp, peft.HRAConfig(r=3, target_modules=["a", "b"], apply_GS=True), (5, 6)),
    "embedding lora": (words, peft.LoraConfig(**LORA, target_modules=["0", "1"]), "ids"),
    "embedding dora": (words, peft.LoraConfig(**DORA, target_modules=["0", "1"]), "ids"),
    "attention": (Attention, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["mha"]), (2, 3, 8)),
    "parameter": (Mixture, peft.LoraConfig(**LORA, target_parameters=["experts.mix"]), (5, 4)),
    "experts": (Mixture, peft.LoraConfig(r=2, target_parameters=["experts.up"]), (5, 4)),
    "three parameters and a layer": (
        Mixture,
        peft.LoraConfig(
            r=2,
            target_modules=["before"],
            target_parameters=["experts.mix", "experts.down", "up"],
            rank_pattern={"experts.down": 1},
            alpha_pattern={"experts.up": 5},
        ),
        (5, 4),
    ),
    "layer norms": (Mlp, peft.LNTuningConfig(target_modules=["norm"]), (5, 6)),
    "beft": (Mlp, peft.BeftConfig(target_modules=["a", "b"]), (5, 6)),
    "all biases": (Mlp, peft.LoraConfig(**LORA, target_modules=["a"], bias="all"), (5, 6)),
    "biases of layers": (
        Mlp,
        peft.LoraConfig(**DORA, target_modules=["a", "b"], bias="lora_only"),
        (5, 6),
    ),
    "biases of oft": (
        Mlp,
        peft.OFTConfig(oft_block_size=2, target_modules=["a"], bias="oft_only"),
        (5, 6),
    ),
    "a head of several layers": (
        Mlp,
        peft.LoraConfig(**LORA, target_modules=["a"], modules_to_save=["head"]),
        (5, 6),
    ),
    "lokr of small layers": (Mlp, peft.LoKrConfig(r=8, target_modules=["a", "b"]), (5, 6)),
    "a rank above the sizes": (Mlp, peft.LoraConfig(r=12, target_modules=["a", "b"]), (5, 6)),
    "pissa": (
        Mlp,
        peft.LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights="pissa"),
        (5, 6),
    ),
    "olora": (
        Mlp,
        peft.LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights="olora"),
        (5, 6),
    ),
    "mica": (
        Mlp,
        peft.LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights="mica"),
        (5, 6),
    ),
}


def saved_by_peft(base, config, folder, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        wrapped.save_pretrained(folder, **settings)
    return wrapped


def loaded(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def made(name):
    make, config, shape = TABLE[name]
    torch.manual_seed(0)
    x = torch.arange(9).view(3, 3) if shape == "ids" else torch.randn(shape)
    return make().eval(), config, x


@pytest.mark.parametrize("name", TABLE)
def test_both_ways(name, tmp_path):
    base, config, x = made(name)
    expected = saved_by_peft(base, config, tmp_path / "theirs")(x)
    params = from_peft(tmp_path / "theirs", base)
    close(lf.fcall(base, params, x), expected)
    assert (expected - base(x)).abs().max() > 1e-3
    to_peft(params, tmp_path / "ours", model=base)
    close(loaded(base, tmp_path / "ours")(x), expected)
    again = from_peft(tmp_path / "ours", base)
    if name not in ("pissa", "olora"):  # which are written as a LoRA of twice the rank
        assert again.keys() == params.keys()
        assert all(torch.equal(again[key], leaf) for key, leaf in params.items())


@pytest.mark.parametrize(
    "config",
    [
        peft.DeftConfig(r=12, alpha=16, decomposition_method="qr", target_modules=["a", "b"]),
        peft.TinyLoraConfig(r=12, u=5, target_modules=["a", "b"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_ranks_that_peft_lowers(config, tmp_path):
    base, _, x = made("a rank above the sizes")
    expected = saved_by_peft(base, config, tmp_path / "theirs")(x)
    params = from_peft(tmp_path / "theirs", base)
    close(lf.fcall(base, params, x), expected)
    with pytest.raises(ValueError, match=r"b: r is 4, elsewhere [68]; PEFT has one"):
        to_peft(params, tmp_path / "ours", model=base)


@pytest.mark.parametrize("site", ["mha.in_proj_weight", "mha.out_proj"])
def test_one_projection_of_attention(site, tmp_path):
    base, _, x = made("attention")
    where = {"target_modules": "out_proj"}
    if "in_proj" in site:
        where = {"target_modules": (), "target_parameters": "in_proj_weight"}
    params = scramble(lf.init(base, lf.LoRA(r=2, **where)))
    to_peft(params, tmp_path, model=base)
    close(loaded(base, tmp_path)(x), lf.fcall(base, params, x))
    assert params.keys() < from_peft(tmp_path, base).keys()


@pytest.mark.parametrize("model", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("head", [None, "trained", "adapted"])
def test_a_classifier_is_loaded_for_its_task(model, head, tmp_path):
    small = SIZES | {"num_labels": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    base = {
        "bert": lambda: BertForSequenceClassification(BertConfig(**small)),
        "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**small)),
        "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**small)),
    }[model]().eval()
    base.save_pretrained(tmp_path / "base")
    cfg = [lf.LoRA(r=2, target_modules="query|q_proj")]
    if head == "trained":
        cfg.append(lf.Full(target_parameters="^(classifier|score)"))
    if head == "adapted":
        cfg = [lf.LoRA(r=2, target_modules="query|q_proj|score|classifier")]
    params, ids = scramble(lf.init(base, cfg)), {"input_ids": torch.arange(3, 13).view(2, 5)}
    to_peft(params, tmp_path / "ours", model=base, base_model_name=str(tmp_path / "base"))
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["task_type"] == (None if head == "adapted" else "SEQ_CLS")
    again = from_peft(tmp_path / "ours", base)
    assert again.keys() == params.keys()
    expected = lf.fcall(base, params, ids).logits
    kind = peft.AutoPeftModel if head == "adapted" else peft.AutoPeftModelForSequenceClassification
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(kind.from_pretrained(tmp_path / "ours").eval()(**ids).logits, expected)
    if head == "adapted":
        with pytest.raises(ValueError, match="PEFT keeps this module whole for 'SEQ_CLS'"):
            to_peft(params, tmp_path / "no", model=base, task_type="SEQ_CLS")


def test_a_task_is_inferred_or_given(tmp_path):
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    params = lf.init(base, lf.LoRA(r=2))
    for given, expected in ((None, "CAUSAL_LM"), ("FEATURE_EXTRACTION", "FEATURE_EXTRACTION")):
        to_peft(params, tmp_path, model=base, task_type=given)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["task_type"] == expected
    with pytest.raises(ValueError, match="task_type: got 'LM', expected one of None, 'SEQ_CLS'"):
        to_peft(params, tmp_path, model=base, task_type="LM")


def test_falcon_is_linear(tmp_path):
    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    base, ids = FalconForCausalLM(FalconConfig(**small)).eval(), torch.arange(3, 13).view(2, 5)
    config = peft.LoraConfig(r=2, target_modules=["query_key_value", "dense_4h_to_h"])
    expected = saved_by_peft(base, config, tmp_path)(input_ids=ids).logits
    params = from_peft(tmp_path, base)
    close(lf.fcall(base, params, {"input_ids": ids}).logits, expected)
    assert len(lf.find_targets(base, lf.LoRA())) == 4


def edited(folder, tensors=None, **settings):
    """Change a checkpoint's files."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    if tensors is not None:
        changed = tensors(load_file(weights))
        save_file({name: t.contiguous() for name, t in changed.items()}, weights)


def without(word):
    return lambda tensors: {name: t for name, t in tensors.items() if word not in name}


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("conv2d lora", ".2.", r"names 1 places .*\['2'\]"),
        ("three parameters and a layer", "before", r"\['before'\]"),
        ("three parameters and a layer", "experts.lora", r"'experts\.mix'"),
        ("attention", "out_proj", r"\['mha\.out_proj'\]"),
        ("a head of several layers", "head.2", r"\['head\.2\.weight', 'head\.2\.bias'\]"),
        ("layer norms", "norm", "holds no tensor"),
    ],
)
def test_what_the_config_promises_is_there(name, missing, message, tmp_path):
    base, config, _ = made(name)
    saved_by_peft(base, config, tmp_path)
    edited(tmp_path, without(missing))
    with pytest.raises(lf.AdapterFileError, match=message):
        from_peft(tmp_path, base)


@pytest.mark.parametrize(
    ("settings", "missing", "message"),
    [
        ({"layers_to_transform": [0]}, "layers.1", None),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, "layers.1", None),
        ({"layers_to_transform": 1}, "layers.1", r"layers\.1\.self_attn\.q_proj'\]"),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, "layers.1", None),
        ({"exclude_modules": r".*\.1\..*"}, "layers.1", None),
        ({"target_modules": r"model\.layers\.0\..*q_proj"}, "layers.1", None),
        ({"target_modules": r".*q_proj"}, "layers.1", r"layers\.1\.self_attn\.q_proj'\]"),
        ({"r": 3}, None, r"q_proj: has rank 2, the config says 3"),
        ({"rank_pattern": {"q_proj": 1}}, None, r"q_proj: has rank 2, the config says 1"),
        ({"some_new_setting": 0.5}, None, r"some_new_setting is 0\.5; .*LORA is unknown here"),
        ({"some_new_setting": None}, None, None),
        ({"target_parameters": ["norm.weight"]}, None, r"norm\.weight"),
    ],
)
def test_layers_that_the_config_names(settings, missing, message, tmp_path):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    saved_by_peft(base, peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    edited(tmp_path, None if missing is None else without(missing), **settings)
    if message is None:
        assert from_peft(tmp_path, base)
        assert from_peft(tmp_path, base.model)
    else:
        with pytest.raises(lf.AdapterFileError, match=message):
            from_peft(tmp_path, base)


def test_tensors_that_are_damaged(tmp_path):
    base, config, _ = made("conv2d lora")
    saved_by_peft(base, config, tmp_path)
    original = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.0.lora_A.weight"

    def refused(change, message, **settings):
        edited(tmp_path, lambda _: change(dict(original)))
        with pytest.raises(lf.AdapterFileError, match=message):
            from_peft(tmp_path, base, **settings)

    refused(lambda t: t | {name: torch.zeros(0)}, r"0\.lora_A\.weight is empty, shape \(0,\)")
    refused(lambda t: t | {name: t[name] * torch.nan}, r"0\.lora_A\.weight holds NaN or infinity")
    assert from_peft(tmp_path, base, allow_nonfinite=True)["0.lora.A"].isnan().all()
    refused(lambda t: t | {f"{name}s": t.pop(name)}, r"holds \['0\.lora_A\.weights")
    refused(lambda t: t | {name: t[name][:, :2]}, r"0\.lora\.A: got shape")
    refused(lambda t: t | {name: t[name].flatten()}, r"0: tensors of shapes .* do not fit")
    refused(lambda t: t | {"base_model.model.9.lora_A.weight": t[name] + 1}, "no module .*'9'")
    refused(lambda t: {}, "holds no tensor")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (conv(groups=2), "0: .*its groups share PEFT's adapter"),
        (conv(padding=1, padding_mode="reflect"), "0: .*PEFT pads the adapter's input with zeros"),
    ],
)
@pytest.mark.parametrize("way", ["read", "written"])
def test_convolutions_on_which_peft_computes_something_else(make, message, way, tmp_path):
    base = make()
    if way == "read":
        saved_by_peft(base, peft.LoraConfig(r=2, target_modules=["0"]), tmp_path)
        with pytest.raises(lf.AdapterFileError, match=message):
            from_peft(tmp_path, base)
    else:
        params = lf.init(base, lf.LoRA(r=2, target_modules="0"))
        with pytest.raises(TypeError, match=message):
            to_peft(params, tmp_path, model=base)


def test_a_whole_factor_of_lokr_on_conv1d_is_refused(tmp_path):
    base = conv(nn.Conv1d)()
    saved_by_peft(base, peft.LoKrConfig(r=8, target_modules=["0"]), tmp_path)
    with pytest.raises(
        lf.AdapterFileError, match=r"0: its tensors .*'lokr_w2'.* of a Conv1d layer"
    ):
        from_peft(tmp_path, base)


def test_overlapping_patches_of_oft(tmp_path):
    base = conv()()
    saved_by_peft(base, peft.OFTConfig(oft_block_size=2, target_modules=["0"]), tmp_path)
    with pytest.raises(lf.AdapterFileError, match="0: PEFT rotates patches that overlap"):
        from_peft(tmp_path, base)


def test_batch_norm_is_refused_by_its_buffers(tmp_path):
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    saved_by_peft(base, config, tmp_path)
    with pytest.raises(lf.AdapterFileError, match=r"1\.\w+: PEFT saved this buffer.*running_mean"):
        from_peft(tmp_path, base)


def test_embeddings_of_another_size(tmp_path):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    other = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.resize_token_embeddings(70)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    saved_by_peft(base, config, tmp_path, save_embedding_layers=True)
    assert all("q_proj" in key for key in from_peft(tmp_path, base))
    message = r"weight: has shape \(64, 32\) in the model and \(70, 32\) in the"
    with pytest.raises(lf.AdapterFileError, match=message):
        from_peft(tmp_path, other)


@pytest.mark.parametrize("kind", ["modules_to_save", "target_modules"])
def test_tied_embeddings_are_one_parameter(kind, tmp_path):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    names = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    if kind == "target_modules":
        names = {"target_modules": ["q_proj", "embed_tokens"]}
    ids = {"input_ids": torch.arange(3, 13).view(2, 5)}
    config = peft.LoraConfig(r=2, **names, ensure_weight_tying=True)
    expected = saved_by_peft(base, config, tmp_path / "theirs")(**ids).logits
    params = from_peft(tmp_path / "theirs", base)
    close(lf.fcall(base, params, ids).logits, expected)
    assert not any("lm_head" in key for key in params)
    to_peft(params, tmp_path / "ours", model=base)
    close(loaded(base, tmp_path / "ours")(**ids).logits, expected)
    assert from_peft(tmp_path / "ours", base).keys() == params.keys()


def test_a_bias_is_trained_everywhere_or_nowhere(tmp_path):
    base = Mlp()
    cfg = [lf.LoRA(r=2, target_modules="^(a|b)"), lf.Full(target_parameters=r"^a\.bias")]
    with pytest.raises(ValueError, match=r"b: its bias is not trained.*of all adapted layers, or"):
        to_peft(lf.init(base, cfg), tmp_path, model=base)


def test_parents_and_children_to_save(tmp_path):
    base = Mlp()
    config = peft.LoraConfig(r=2, target_modules=["a"], modules_to_save=["head"])
    saved_by_peft(base, config, tmp_path)
    edited(tmp_path, modules_to_save=["head", "head.0"])
    with pytest.raises(lf.AdapterFileError, match=r"head\.0: modules_to_save names it and 'head'"):
        from_peft(tmp_path, base)


def test_trained_parameters_of_a_module_with_others_inside(tmp_path):
    base, _, x = made("attention")
    cfg = [
        lf.LoRA(r=2, target_modules="before"),
        lf.Full(target_parameters=r"in_proj_weight|out_proj\.bias"),
    ]
    params = scramble(lf.init(base, cfg))
    to_peft(params, tmp_path, model=base)
    expected = lf.fcall(base, params, x)
    close(loaded(base, tmp_path)(x), expected)
    again = from_peft(tmp_path, base)
    close(lf.fcall(base, again, x), expected)
    assert params.keys() < again.keys()
    inside = scramble(
        lf.init(
            base,
            [lf.LoRA(r=2, target_modules="out_proj"), lf.Full(target_parameters="in_proj_bias")],
        )
    )
    with pytest.raises(ValueError, match=r"mha\.out_proj: has an adapter, and mha around it"):
        to_peft(inside, tmp_path, model=base)


def test_an_embedding_that_peft_would_read_as_another_change(tmp_path):
    base = words()
    params = lf.init(base, lf.OFT(block_size=3, target_modules="^0"))
    with pytest.raises(TypeError, match="0: oft on a Embedding layer is not written: PEFT would"):
        to_peft(params, tmp_path, model=base)


@pytest.mark.parametrize("targets", ["^score", "norm", "norm|^score"])
def test_trained_parameters_alone(targets, tmp_path):
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3, pad_token_id=0)).eval()
    params = scramble(lf.init(base, lf.Full(target_parameters=targets)))
    ids = {"input_ids": torch.arange(3, 13).view(2, 5)}
    to_peft(params, tmp_path, model=base)
    expected = lf.fcall(base, params, ids).logits
    close(loaded(base, tmp_path)(**ids).logits, expected)
    again = from_peft(tmp_path, base)
    assert again.keys() == params.keys()
    close(lf.fcall(base, again, ids).logits, expected)


class OwnNames(nn.Module):
    """Modules with the names that PEFT gives to its own."""

    def __init__(self):
        super().__init__()
        self.lin, self.original_module = nn.Linear(4, 4), nn.Linear(4, 4)
        self.a = nn.ModuleDict(
            {
                name: nn.ModuleDict({"lin": nn.Linear(4, 4)})
                for name in ("base_layer", "modules_to_save")
            }
        )

    def forward(self, x):
        x = self.original_module(self.lin(x))
        return self.a["modules_to_save"]["lin"](self.a["base_layer"]["lin"](x))


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, target_modules=["lin"], modules_to_save=["original_module"]),
        peft.LoraConfig(r=2, target_modules=["lin", "original_module"]),
        peft.LoraConfig(r=2, target_modules=["original_module"], modules_to_save=["lin"]),
        peft.LoraConfig(r=2, target_modules=["a.base_layer.lin"], bias="lora_only"),
    ],
    ids=["head", "layers", "saved", "bias"],
)
def test_a_model_with_the_names_of_peft(config, tmp_path):
    torch.manual_seed(0)
    base, x = OwnNames().eval(), torch.randn(3, 4)
    expected = saved_by_peft(base, config, tmp_path / "theirs")(x)
    params = from_peft(tmp_path / "theirs", base)
    close(lf.fcall(base, params, x), expected)
    to_peft(params, tmp_path / "ours", model=base)
    close(loaded(base, tmp_path / "ours")(x), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a value like 8, finite"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', expected a value like 8"),
        ({"lora_dropout": 1.5}, r"lora_dropout is 1\.5, expected .* below 1"),
        ({"r": 2.5}, r"r is 2\.5"),
        ({"use_rslora": 1}, "use_rslora is 1"),
        ({"bias": "weird"}, "bias is 'weird', expected none, all or"),
        ({"bias": "lora_only"}, r"names 2 places .*'a\.bias', 'b\.bias'"),
        ({"bias": "all"}, r"names 5 places .*'norm\.bias'"),
    ],
)
def test_settings_with_wrong_values(settings, message, tmp_path):
    base = Mlp()
    saved_by_peft(base, peft.LoraConfig(r=2, target_modules=["a", "b"]), tmp_path)
    edited(tmp_path, **settings)
    with pytest.raises(lf.AdapterFileError, match=message):
        from_peft(tmp_path, base)
