"""Small models with 4-bit and 8-bit weights, and the same models dequantised."""

import copy
import logging

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import PreTrainedModel

from lora_func.weights import affine, dense
from tests.support.models import make

# bitsandbytes warns at each call of an 8-bit layer in float32
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

KINDS = {
    "nf4": {"compress_statistics": True},
    "fp4": {"compress_statistics": False},
    "int8": {"threshold": 0.0},
    "int8, outliers": {"threshold": 1.5},
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def quantise_layer(
    layer: nn.Linear, kind: str, compute_dtype: torch.dtype | None = torch.float32
) -> nn.Linear:
    """The bitsandbytes version of a layer, on the same device."""
    shape, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
    weight, device = layer.weight.detach().clone().cpu(), layer.weight.device
    if kind.startswith("int8"):
        new = bnb.nn.Linear8bitLt(*shape, has_bias, has_fp16_weights=False, **KINDS[kind])
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        settings = KINDS[kind] | {"quant_type": kind}
        new = bnb.nn.Linear4bit(*shape, has_bias, compute_dtype=compute_dtype, **settings)
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=new, **settings)
        # on some CPUs the bitsandbytes forward repacks the weight permanently
        new.support_avx512bf16_for_cpu = False
    new.bias = copy.deepcopy(layer.bias)
    return new.to(device).train(layer.training).requires_grad_(False)


def quantised(
    model: nn.Module, kind: str, compute_dtype: torch.dtype | None = torch.float32
) -> nn.Module:
    """Quantise every linear layer except the head, in place."""
    for path, module in [*model.named_modules()]:
        if type(module) is nn.Linear and not path.endswith(("lm_head", "classifier")):
            model.set_submodule(path, quantise_layer(module, kind, compute_dtype))
    return model.requires_grad_(False)


def dequantised(model: nn.Module) -> nn.Module:
    """A copy of the model with dense linear layers."""
    model = copy.deepcopy(model)
    for path, module in [*model.named_modules()]:
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            W = affine(module)
            layer = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            layer.weight.data, layer.bias = dense(W), module.bias
            model.set_submodule(path, layer.train(module.training))
    return model.requires_grad_(False)


def make_quantised(family: str, kind: str, **settings: object) -> PreTrainedModel:
    no_dropout = NO_DROPOUT if family == "bert" else {}
    return quantised(make(family, **no_dropout), kind, **settings)
