"""Trained rows of embeddings, and of the heads that are tied to them."""

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import lora_func as lf
from lora_func.peft import from_peft, to_peft
from tests.support.parity import relative

IDS = [3, 17, 5]
TOKENS = torch.tensor([[1, 3, 5, 5], [17, 2, 0, 3]])
BATCH = {"input_ids": TOKENS}
LABELLED = BATCH | {"labels": TOKENS}
BOTH = ["embed_tokens", "lm_head"]


def llama(tied=True):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=20, num_hidden_layers=1, tie_word_embeddings=tied, **sizes)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def t5():
    torch.manual_seed(0)
    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config).eval().requires_grad_(False)


def trained(params, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in lf.partition(params)[0].values():
            leaf.add_(0.1 * torch.randn(leaf.shape, generator=generator))
    return params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_replaced(dtype):
    model = nn.Sequential(nn.Embedding(20, 6, padding_idx=5)).to(dtype)
    params = lf.init(model, lf.TrainableTokens(token_ids=IDS, target_modules="0"))
    assert torch.equal(lf.fcall(model, params, TOKENS), model(TOKENS))
    trained(params)
    table = model[0].weight.clone()
    table[IDS] += params["0.trainable_tokens.rows"].detach().to(dtype)
    expected = nn.functional.embedding(TOKENS, table, padding_idx=5)
    y = lf.fcall(model, params, TOKENS)
    torch.testing.assert_close(y, expected)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), params["0.trainable_tokens.rows"])
    assert gradient.any(-1).tolist() == [True, True, False]  # the last one is the padding


def test_nothing_has_the_size_of_the_table():
    model = nn.Sequential(nn.Embedding(5000, 64)).requires_grad_(False)
    params = trained(lf.init(model, lf.TrainableTokens(token_ids=IDS, target_modules="0")))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, id):
        y = lf.fcall(model, params, TOKENS)
    assert max(saved, default=0) < 5000
    assert y.requires_grad


@pytest.fixture
def tied():
    model = llama()
    cfg = lf.TrainableTokens(token_ids=IDS, target_modules=BOTH, tied=True)
    return model, lf.init(model, cfg)


def by_hand(model, rows):
    """The model with new rows in its tied table."""
    other = llama()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.model.embed_tokens.weight[IDS] += rows
    return other


def test_tied_heads_share_the_rows(tied):
    model, params = tied
    assert {key: tuple(leaf.shape) for key, leaf in params.items()} == {
        "*.trainable_tokens.rows": (3, 16),
        "model.embed_tokens.trainable_tokens._inputs": (3,),
        "lm_head.trainable_tokens._outputs": (3,),
    }
    assert torch.equal(lf.fcall(model, params, BATCH).logits, model(**BATCH).logits)
    trained(params)
    rows = params["*.trainable_tokens.rows"]
    other = by_hand(model, rows.detach())
    table = other.model.embed_tokens.weight.requires_grad_()
    torch.testing.assert_close(lf.fcall(model, params, BATCH).logits, other(**BATCH).logits)
    (gradient,) = torch.autograd.grad(lf.fcall(model, params, LABELLED), rows)
    (expected,) = torch.autograd.grad(other(**LABELLED).loss, table)
    assert relative(gradient, expected[IDS]) < 1e-5


def test_a_sweep_trains_rows_for_each_member(tied):
    model, params = tied
    members = [trained({k: v.clone().detach() for k, v in params.items()}, i) for i in range(3)]
    members = [{k: v.requires_grad_(not k.endswith("puts")) for k, v in m.items()} for m in members]
    losses = lf.vcall(model, lf.stack(members), LABELLED)
    alone = torch.stack([lf.fcall(model, one, LABELLED) for one in members])
    torch.testing.assert_close(losses, alone)


def test_merge_attach_and_files(tied, tmp_path):
    model, params = tied
    trained(params)
    expected = lf.fcall(model, params, BATCH).logits
    merged = llama()
    merged.load_state_dict(lf.merge(model, params))
    torch.testing.assert_close(merged(**BATCH).logits, expected)
    lf.save(params, tmp_path / "rows.safetensors", model=model)
    again = lf.load(tmp_path / "rows.safetensors", model=model)
    assert torch.equal(lf.fcall(model, again, BATCH).logits, expected)
    attached = lf.attach(model, params)
    torch.testing.assert_close(model(**BATCH).logits, expected)
    attached.remove()


def test_new_tokens_of_a_resized_model():
    model = llama()
    with pytest.raises(
        ValueError, match=r"embed_tokens: trainable_tokens: token_ids: 21 is none of the 20"
    ):
        lf.init(model, lf.TrainableTokens(token_ids=[21], target_modules="embed_tokens"))
    model.resize_token_embeddings(24)
    cfg = lf.TrainableTokens(token_ids=[20, 21, 22, 23], target_modules=BOTH, tied=True)
    params = trained(lf.init(model, cfg))
    batch = {"input_ids": TOKENS + 5}
    assert not torch.equal(lf.fcall(model, params, batch).logits, model(**batch).logits)


MODELS = {"tied": llama, "untied": lambda: llama(tied=False), "t5": t5}


CONFIGS = {
    "alone": lambda: peft.TrainableTokensConfig(token_indices=IDS),
    "beside": lambda: peft.LoraConfig(
        r=2, target_modules=r".*\.(q_proj|q)", trainable_token_indices=IDS
    ),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("config", CONFIGS)
def test_pefts_checkpoints_are_read_and_written(name, config, tmp_path):
    theirs = peft.get_peft_model(MODELS[name](), CONFIGS[config]())
    batch = BATCH | ({"decoder_input_ids": TOKENS} if name == "t5" else {})
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    expected = theirs.eval()(**batch).logits
    theirs.save_pretrained(tmp_path / "theirs")
    model = MODELS[name]()
    params = from_peft(tmp_path / "theirs", model)
    torch.testing.assert_close(lf.fcall(model, params, batch).logits, expected)
    assert any(key.endswith("trainable_tokens.rows") for key in params)
    to_peft(params, tmp_path / "ours", model=model)
    again = peft.PeftModel.from_pretrained(MODELS[name](), tmp_path / "ours").eval()
    torch.testing.assert_close(again(**batch).logits, expected)
    back = from_peft(tmp_path / "ours", model)
    assert back.keys() == params.keys()
    for key, leaf in params.items():
        torch.testing.assert_close(back[key], leaf)


def test_what_peft_cannot_hold(tmp_path):
    model = llama()
    one = lf.init(model, lf.TrainableTokens(token_ids=IDS, target_modules="embed_tokens"))
    with pytest.raises(ValueError, match="whose tables are tied; adapt all of them with"):
        to_peft(one, tmp_path, model=model)
    model = llama(tied=False)
    head = lf.init(model, lf.TrainableTokens(token_ids=IDS, target_modules="lm_head"))
    with pytest.raises(TypeError, match="lm_head: PEFT trains tokens of an embedding"):
        to_peft(head, tmp_path, model=model)
    beside = lf.init(model, lf.IA3(target_modules="k_proj"))
    rows = lf.init(model, lf.TrainableTokens(token_ids=IDS, target_modules="embed_tokens"))
    with pytest.raises(ValueError, match="holds trained tokens beside IA3"):
        to_peft(rows | beside, tmp_path, model=model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token_ids": []}, r"token_ids: got \[\]"),
        ({"token_ids": [1, 1]}, r"token_ids: got \[1, 1\], expected different integers"),
        ({"token_ids": 5}, "token_ids: got int, expected a list of integers"),
        ({"token_ids": [-1]}, r"token_ids: got \[-1\]"),
        ({"token_ids": [1], "target_modules": ()}, "target_modules: got no pattern; name the"),
        ({"token_ids": [1], "tied": 1}, "tied: got 1"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lf.TrainableTokens(**{"target_modules": "0"} | settings)
