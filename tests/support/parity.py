"""Compare a variant with PEFT's module: outputs, all gradients, the merged weight and bias."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from torch import Tensor, nn

import lora_func as lf
from lora_func.adapter import parse
from lora_func.variants import by_config
from lora_func.weights import affine

D_IN, D_OUT = 48, 64
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

Link = Callable[[nn.Module], Mapping[str, tuple[Tensor, Callable[[Tensor], Tensor]]]]
"""From PEFT's layer: our leaf -> (their parameter, how ours is read from it)."""


def same(tensor: Tensor) -> Tensor:
    return tensor


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def assert_parity(
    cfg: lf.AdapterConfig,
    theirs: peft.PeftConfig,
    link: Link,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    constants: Callable[[nn.Module], Mapping[str, Tensor]] = lambda layer: {},
    spread: float = 1.0,
    merges: bool = True,
) -> None:
    """Set both adapters to the same random values and compare their results."""
    errors = parity_errors(
        cfg, theirs, link, bias=bias, dtype=dtype, constants=constants, spread=spread, merges=merges
    )
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
    assert not wrong


def parity_errors(
    cfg: lf.AdapterConfig,
    theirs: peft.PeftConfig,
    link: Link,
    *,
    bias: bool,
    dtype: torch.dtype,
    constants: Callable[[nn.Module], Mapping[str, Tensor]],
    spread: float,
    merges: bool,
) -> dict[str, float]:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=bias)).to(dtype).requires_grad_(False)
    layer = peft.get_peft_model(copy.deepcopy(model), theirs).base_model.model[0].to(dtype)
    linked = link(layer)
    for parameter, _ in linked.values():
        parameter.data.normal_(std=spread)
    params = lf.init(model, cfg, dtype=dtype)
    keys = {parse(key).leaf: key for key in params}
    for leaf, (parameter, ours) in linked.items():
        shape = params[keys[leaf]].shape
        params[keys[leaf]] = ours(parameter.data).reshape(shape).clone().requires_grad_()
    given = constants(layer)
    params |= {keys[leaf]: tensor for leaf, tensor in given.items()}
    assert {*linked, *given} >= {parse(key).leaf for key in lf.partition(params)[0]}

    x = torch.randn(2, 7, D_IN, dtype=dtype, requires_grad=True)
    their_x = x.detach().clone().requires_grad_()
    y, their_y = lf.fcall(model, params, x), layer(their_x)
    errors = {"y": relative(y, their_y)}
    weights = torch.randn_like(y)
    dx, *gradients = torch.autograd.grad(
        (y * weights).sum(), [x, *(params[keys[leaf]] for leaf in linked)]
    )
    their_dx, *their_gradients = torch.autograd.grad(
        (their_y * weights).sum(), [their_x, *(parameter for parameter, _ in linked.values())]
    )
    errors["dx"] = relative(dx, their_dx)
    for (leaf, (_, ours)), gradient, other in zip(
        linked.items(), gradients, their_gradients, strict=True
    ):
        errors[f"d{leaf}"] = relative(gradient, ours(other).reshape(gradient.shape))
    if merges:
        errors |= _merged_errors(cfg, model[0], {leaf: params[keys[leaf]] for leaf in keys}, layer)
    return errors


def _merged_errors(
    cfg: lf.AdapterConfig, module: nn.Linear, leaves: dict[str, Tensor], layer: Any
) -> dict[str, float]:
    variant, W = by_config(cfg), affine(module)
    layer.merge()
    merged = layer.get_base_layer()
    errors = {"weight": relative(variant.weight(W, leaves), merged.weight)}
    bias = variant.bias(W.bias, leaves) if variant.bias else W.bias
    assert (bias is None) == (merged.bias is None)
    if bias is not None:
        errors["bias"] = relative(bias, merged.bias)
    return errors
