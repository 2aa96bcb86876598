"""PEFT checkpoints: export and import in both directions give equal outputs."""

import copy
import json
import warnings

import peft
import pytest
import torch
from peft import PeftModel
from torch import nn

import lora_func as lf
from lora_func.peft import _write, from_peft, to_peft
from lora_func.peft._formats import writable_format
from tests.support.cases import CASES
from tests.support.models import batch_for, make, scramble
from tests.support.pairs import adapter
from tests.support.snapshots import assert_same, snapshot


def format_of(case):
    """The format in which a case is written, if PEFT has one."""
    return writable_format(case.variant, case.layer().leaves, "Linear")


PAIRS = [
    (case, family)
    for case in CASES
    if case.variant.parameters is None and (found := format_of(case)) is not None
    for family in (("qwen3", "gpt2", "bert") if "Conv1D" in found.layers else ("qwen3", "bert"))
    if (case.name, family) != ("bitfit", "qwen3")  # its layers have no bias
]
EACH_PAIR = pytest.mark.parametrize(("case", "family"), PAIRS, ids=str)


def loaded(folder, family, **settings):
    """PEFT's model from a checkpoint folder, on a fresh base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(make(family, **settings), folder).eval()


def logits(model, batch):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # PEFT's AdaLoRA adds to a loss what an adapter that is loaded for inference lacks
        return model(**{name: t for name, t in batch.items() if name != "labels"}).logits


def ours(model, params, batch):
    with torch.no_grad(), lf.adapted(model, params):
        return model(**batch).logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def small(params):
    """Leaves close to their initial values, to avoid overflow."""
    trained, constants = lf.partition(params)
    generator = torch.Generator().manual_seed(0)
    moved = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in trained.items()}
    return {key: (moved | constants)[key].detach() for key in params}


@EACH_PAIR
def test_peft_loads_what_is_written(case, family, tmp_path):
    model = make(family).requires_grad_(False)
    params, batch = small(adapter(case, model)), batch_for(model)
    before = snapshot(model)
    to_peft(params, tmp_path, model=model, base_model_name="a base")
    assert_same(before, model)
    found = logits(loaded(tmp_path, family), batch)
    close(found, ours(model, params, batch))
    assert (found - logits(model, batch)).abs().max() > 1e-4
    again = from_peft(tmp_path, model)
    if format_of(case).convert is not None:
        close(ours(model, again, batch), found)
        return
    assert {*again} == {*params}
    for key, leaf in params.items():
        assert torch.equal(again[key], leaf), key
        assert again[key].dtype == leaf.dtype, key


PEFT = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", lora_dropout=0.1),
    "rslora": peft.LoraConfig(r=3, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    "patterns": peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
        rank_pattern={"q_proj": 4, r"layers\.1\.self_attn\.v_proj": 1},
        alpha_pattern={"k_proj": 3, "q_proj": 16},
        layers_to_transform=[1],
        layers_pattern="layers",
    ),
    "dora": peft.LoraConfig(r=2, use_dora=True, target_modules=r".*\.(q|up)_proj"),
    "modules to save": peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["input_layernorm", "lm_head"]
    ),
    "embedding": peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    "delora": peft.DeloraConfig(r=2, target_modules="all-linear", rank_pattern={"q_proj": 3}),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "hra": peft.HRAConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "vera": peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"]),
    "oft": peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=["q_proj"]),
    "oft, terms": peft.OFTConfig(
        oft_block_size=8, num_cayley_neumann_terms=3, target_modules=["q_proj"]
    ),
    "road": peft.RoadConfig(variant="road_4", group_size=8, target_modules=["q_proj", "up_proj"]),
    "shira": peft.ShiraConfig(r=1, target_modules=["q_proj", "up_proj"], random_seed=0),
}


def saved_by_peft(config, folder, **settings):
    """A PEFT model with perturbed adapter weights, saved as a checkpoint."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(make("qwen3", **settings), config).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
        theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("name", PEFT)
def test_we_load_pefts(name, tmp_path):
    theirs = saved_by_peft(PEFT[name], tmp_path)
    model, batch = make("qwen3").requires_grad_(False), batch_for(theirs)
    expected = logits(theirs, batch)
    params = from_peft(tmp_path, model)
    close(ours(model, params, batch), expected)
    assert (expected - logits(model, batch)).abs().max() > 1e-4
    assert all(leaf.requires_grad for leaf in lf.partition(params)[0].values())
    to_peft(params, tmp_path / "again", model=model)
    found = from_peft(tmp_path / "again", model)
    assert {*found} == {*params}
    assert all(torch.equal(found[key], leaf) for key, leaf in params.items())


def test_patterns_of_ours(tmp_path):
    """Each site has its own rank and scale."""
    model = make("qwen3").requires_grad_(False)
    cfg = lf.LoRA(r=3, alpha=7, rank_pattern={"q_proj": 1, "up": 5}, alpha_pattern={"v_proj": 2})
    params, batch = scramble(lf.init(model, cfg)), batch_for(model)
    to_peft(params, tmp_path, model=model)
    close(logits(loaded(tmp_path, "qwen3"), batch), ours(model, params, batch))
    assert all(torch.equal(from_peft(tmp_path, model)[k], leaf) for k, leaf in params.items())


@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_trained_modules_beside(family, tmp_path):
    model = make(family).requires_grad_(False)
    cfg = [lf.LoRA(r=2), lf.Full(target_parameters=r"LayerNorm|classifier|norm\.weight")]
    params, batch = scramble(lf.init(model, cfg)), batch_for(model)
    to_peft(params, tmp_path, model=model)
    close(logits(loaded(tmp_path, family), batch), ours(model, params, batch))
    again = from_peft(tmp_path, model)
    assert all(torch.equal(again[key], leaf) for key, leaf in params.items())


def test_an_embedding_of_another_base(tmp_path):
    """PEFT saves the weight of an adapted embedding together with the adapter."""
    saved_by_peft(PEFT["embedding"], tmp_path)
    model = make("qwen3").requires_grad_(False)
    model.model.embed_tokens.weight[3, 3] += 1
    with pytest.raises(lf.AdapterFileError, match="the checkpoint holds another weight"):
        from_peft(tmp_path, model)


def test_names_with_and_without_the_base(tmp_path):
    """An adapter saved with the head model loads into its base model, and vice versa."""
    model = make("qwen3").requires_grad_(False)
    cfg = lf.LoRA(r=2, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 20})
    params = scramble(lf.init(model, cfg))
    to_peft(params, tmp_path / "whole", model=model)
    inner = from_peft(tmp_path / "whole", model.model)
    assert {f"model.{key}" for key in inner} == {*params}
    assert all(torch.equal(params[f"model.{key}"], leaf) for key, leaf in inner.items())
    to_peft(inner, tmp_path / "base", model=model.model)
    again = from_peft(tmp_path / "base", model)
    assert {*again} == {*params}
    assert all(torch.equal(params[key], leaf) for key, leaf in again.items())


def test_settings_that_a_config_leaves_out(tmp_path):
    """Missing settings get PEFT's defaults."""
    model = make("qwen3").requires_grad_(False)
    batch = batch_for(model)
    for cfg, names in {
        lf.OFT(block_size=8, neumann_terms=5): ["use_cayley_neumann", "num_cayley_neumann_terms"],
        lf.LoRA(r=2, alpha=8): ["lora_alpha"],
        lf.ROAD(group_size=8): ["variant"],
    }.items():
        params = small(lf.init(model, cfg))
        to_peft(params, tmp_path, model=model)
        path = tmp_path / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in config.items() if k not in names}))
        close(ours(model, from_peft(tmp_path, model), batch), ours(model, params, batch))
        close(logits(loaded(tmp_path, "qwen3"), batch), ours(model, params, batch))


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_trained_parameters_that_are_tied(name, tmp_path):
    """PEFT trains a separate copy at each place; lora_func trains one shared parameter."""
    model = make("qwen3", **TIED).requires_grad_(False)
    cfg = [lf.LoRA(r=2, target_modules="q_proj"), lf.Full(target_parameters="embed_tokens")]
    params, batch = scramble(lf.init(model, cfg)), batch_for(model)
    to_peft(params, tmp_path / "ours", model=model)
    close(logits(loaded(tmp_path / "ours", "qwen3", **TIED), batch), ours(model, params, batch))
    again = from_peft(tmp_path / "ours", model)
    assert all(torch.equal(again[key], leaf) for key, leaf in params.items())

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[name])
    saved_by_peft(config, tmp_path / "theirs", **TIED)
    with pytest.raises(lf.AdapterFileError, match=r"is tied in the model.*untie them in the model"):
        from_peft(tmp_path / "theirs", model)


class Score(nn.Module):
    """A head with one output, and two names with the same suffix."""

    def __init__(self):
        super().__init__()
        self.x_proj, self.proj = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.proj(self.x_proj(x))


@pytest.mark.parametrize("side", ["input", "output"])
def test_gains_of_a_score(side, tmp_path):
    model, x = Score().requires_grad_(False), torch.randn(3, 4)
    kinds = (lf.IA3FF, lf.IA3) if side == "input" else (lf.IA3, lf.IA3FF)
    cfg = [kinds[0](target_modules="^proj"), kinds[1](target_modules="^x_proj")]
    params = scramble(lf.init(model, cfg))
    to_peft(params, tmp_path, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    close(theirs(x), lf.fcall(model, params, x))
    again = from_peft(tmp_path, model)
    assert all(torch.equal(again[key], leaf) for key, leaf in params.items())


def test_a_module_to_save_with_others_inside(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"])
    theirs = saved_by_peft(config, tmp_path)
    model, batch = make("qwen3").requires_grad_(False), batch_for(theirs)
    close(ours(model, from_peft(tmp_path, model), batch), logits(theirs, batch))


def test_half_a_checkpoint_is_none(tmp_path, monkeypatch):
    model = make("qwen3").requires_grad_(False)
    to_peft(lf.init(model, lf.LoRA(r=2, alpha=4)), tmp_path, model=model)
    replace_file, calls = _write.replace_file, []

    def failing(path, *args):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("full")
        replace_file(path, *args)

    monkeypatch.setattr(_write, "replace_file", failing)
    with pytest.raises(OSError, match="full"):
        to_peft(lf.init(model, lf.LoRA(r=2, alpha=40)), tmp_path, model=model)
    with pytest.raises(FileNotFoundError):
        from_peft(tmp_path, model)


class Ambiguous(nn.Module):
    """One layer's path is a suffix of another layer's path."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"up": nn.Linear(4, 4)})

    def forward(self, x):
        return self.block["up"](self.up(x))


def test_paths_that_end_alike(tmp_path):
    model, x = Ambiguous().requires_grad_(False), torch.randn(2, 4)
    params = scramble(lf.init(model, lf.LoRA(r=2, target_modules="^up$")))
    to_peft(params, tmp_path, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    close(theirs(x), lf.fcall(model, params, x))


def test_what_is_not_written(tmp_path):
    model = make("qwen3").requires_grad_(False)

    def refused(params, error, message, **settings):
        with pytest.raises(error, match=message):
            to_peft(params, tmp_path / "none", model=model, **settings)
        assert not (tmp_path / "none").exists()

    lora = lf.init(model, lf.LoRA(r=2, target_modules="q_proj"))
    refused(lf.stack([lora, lora]), ValueError, "is a stack")
    mixed = lora | lf.init(model, lf.IA3(target_modules="v_proj"))
    refused(mixed, ValueError, r"\['lora', 'ia3'\]; a checkpoint of PEFT has one kind")
    refused(lf.init(model, lf.SSVD(r=2)), TypeError, "ssvd on a Linear layer is not .*to_lora")
    copied = lf.init(model, lf.DeLoRA(r=2, init="frozen_copy"))
    refused(copied, TypeError, "delora on a Linear layer is not written")
    hra = lf.init(model, lf.HRA(r=2, rank_pattern={"q_proj": 4}))
    refused(hra, ValueError, r"q_proj: r is 4, elsewhere 2; PEFT has one")
    refused(lora | {"x": torch.ones(1)}, KeyError, "no adapter key")
    for cfg, what in [
        (lf.DoRA(r=2), "DoRA"),
        ([lf.LoRA(r=2), lf.Full(target_parameters="norm")], "modules_to_save"),
        (lf.IA3(), "adapters of kind IA3"),
        (lf.LoRA(r=2, rank_pattern={"q_proj": 4}), "scales that differ"),
    ]:
        refused(lf.init(model, cfg), ValueError, f"vLLM does not serve.*{what}", target="vllm")
    to_peft(lora, tmp_path / "served", model=model, target="vllm")
    with pytest.raises(TypeError, match="Linear: PEFT wraps parts of a model"):
        to_peft(lf.init(nn.Linear(4, 4), lf.LoRA(r=2)), tmp_path / "none", model=nn.Linear(4, 4))
    model = make("gpt2").requires_grad_(False)
    refused(lf.init(model, lf.HRA(r=2)), TypeError, "hra on a Conv1D layer is not written")


def test_what_is_not_read(tmp_path):
    model = make("qwen3").requires_grad_(False)
    params = lf.init(model, lf.LoRA(r=2))
    to_peft(params, tmp_path, model=model)
    path, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config = json.loads(path.read_text())

    def refused(message, **settings):
        path.write_text(json.dumps(config | settings))
        with pytest.raises(lf.AdapterFileError, match=message):
            from_peft(tmp_path, model)
        path.write_text(json.dumps(config))

    refused("is of kind 'XLORA'; the kinds that are read are", peft_type="XLORA")
    refused("init_lora_weights is 'corda'; this setting", init_lora_weights="corda")
    refused("use_new_forward is True; this setting of LORA is unknown", use_new_forward=True)
    refused("are not what the config says", use_dora=True)
    refused("lora_alpha is 4.0; this setting of HRA is unknown", peft_type="HRA")
    with pytest.raises(lf.AdapterFileError, match="no module and no parameter"):
        from_peft(tmp_path, make("gpt2"))
    path.write_text("{")
    with pytest.raises(lf.AdapterFileError, match="is no config of PEFT"):
        from_peft(tmp_path, model)
    path.write_text(json.dumps(config))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(lf.AdapterFileError, match="is no safetensors file, or broken"):
        from_peft(tmp_path, model)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="pickled weights are never loaded"):
        from_peft(tmp_path, model)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        from_peft(tmp_path, model)


@pytest.mark.parametrize("name", ["typo", "/nowhere/at/all", "./checkpoint"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(lf.AdapterFileError, match="is no folder; a name on the hub has the form"):
        lf.peft.from_peft(name, torch.nn.Linear(4, 4))
