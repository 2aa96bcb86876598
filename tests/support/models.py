"""Small models with random weights, built from configs."""

import copy
import threading

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import lora_func as lf
from lora_func.adapter import group
from lora_func.variants import by_name
from lora_func.weights import affine

VOCABULARY = 64
WIDTHS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIZES = {"vocab_size": VOCABULARY, **WIDTHS}


def qwen3(**settings: object) -> PreTrainedModel:
    config = Qwen3Config(
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **{**SIZES, "use_cache": False} | settings,
    )
    return Qwen3ForCausalLM(config).eval()


def gpt2(**settings: object) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=False,
        **settings,
    )
    model = GPT2LMHeadModel(config).eval()
    model.loss_type = "ForCausalLM"  # if unset, transformers logs a message and torch.compile fails
    return model


def bert(**settings: object) -> PreTrainedModel:
    config = BertConfig(
        max_position_embeddings=64,
        num_labels=3,
        **SIZES | settings,
    )
    return BertForSequenceClassification(config).eval()


MODELS = {"qwen3": qwen3, "gpt2": gpt2, "bert": bert}


def make(name: str, dtype: torch.dtype = torch.float32, **settings: object) -> PreTrainedModel:
    """A model of one family; GPT-2's biases start at zero, so they are randomized."""
    torch.manual_seed(0)
    model = MODELS[name](**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def batch_for(
    model: PreTrainedModel, rows: int = 3, tokens: int = 10, seed: int = 0
) -> dict[str, Tensor]:
    """Random tokens with padding at the end of one row, and labels for the model's task."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if model.config.model_type == "bert":
        labels = torch.randint(0, model.config.num_labels, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def scramble(params: lf.Params, seed: int = 0) -> lf.Params:
    """Add noise to every trained leaf, in place."""
    generator = torch.Generator().manual_seed(seed)
    for leaf in lf.partition(params)[0].values():
        leaf.data += 0.1 * torch.randn(leaf.shape, generator=generator).to(leaf)
    return params


def merged(model: PreTrainedModel, params: lf.Params) -> PreTrainedModel:
    """A copy of the model with the adapter merged into its weights and biases."""
    model = copy.deepcopy(model)
    for (site, name), keys in group(params).items():
        module, variant = model.get_submodule(site), by_name(name)
        leaves = {leaf: params[key].detach() for leaf, key in keys.items()}
        W = affine(module)
        weight = variant.weight(W, leaves)
        module.weight = nn.Parameter(weight if isinstance(module, nn.Linear) else weight.T)
        if variant.bias is not None:
            bias = variant.bias(W.bias, leaves)
            module.bias = None if bias is None else nn.Parameter(bias)
    return model


def lora(model, seed=0, **settings):
    return scramble(lf.init(model, lf.LoRA(**{"r": 3, "alpha": 4.0} | settings), seed=seed), seed)


class Gate(nn.Module):
    """A layer whose forward pass blocks until ``go`` is set."""

    def __init__(self):
        super().__init__()
        self.inside, self.go = threading.Event(), threading.Event()

    def forward(self, x):
        self.inside.set()
        assert self.go.wait(60)
        return x


class TiedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))
