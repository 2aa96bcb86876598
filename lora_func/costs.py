"""What each variant costs on one layer: parameters, products, constants and the start."""

import time
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lora_func.adapter import partition
from lora_func.initialization import init
from lora_func.runtime import fcall
from lora_func.variant import Params, Trial, Variant


class Cost(NamedTuple):
    """The cost of an adapter on one layer.

    Attributes:
        trained: Trained parameters.
        products: Multiply-adds of matrix products for each token, in the forward pass, beside those
            of the frozen layer; other operations, such as Fourier transforms, are not counted.
        fixed: Multiply-adds of matrix products for each call, whatever the number of tokens.
        constants: Numbers that are stored and not trained.
        seconds: The time of ``init``.
    """

    trained: int
    products: float
    fixed: int
    constants: int
    seconds: float


def cost_of(variant: Variant, trial: Trial, width: int, rank: int) -> Cost:
    """Measure what a variant costs on a square layer with a bias.

    Args:
        variant: The variant.
        trial: Its settings.
        width: The width of the layer.
        rank: The rank, for configs that have one.

    Returns:
        The cost.

    Raises:
        ValueError: If the variant does not accept the width or the rank.
    """
    cfg = variant.config(**trial.settings)
    if getattr(cfg, "r", None) is not None:
        cfg = replace(cfg, r=rank)  # type: ignore[call-arg]
    generator = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Linear(width, width)).requires_grad_(False)
    batches = [torch.randn(4, 8, width, generator=generator) for _ in range(2)]
    data = [(batches[0], batches[1])] if cfg.calibration == "pairs" else batches
    start = time.perf_counter()
    params = init(layer, cfg, data=data if trial.data else None, loss_fn=_loss)
    seconds = time.perf_counter() - start
    few, many = (_products(layer, params, tokens) for tokens in (8, 16))
    trained, constants = partition(params)
    return Cost(
        sum(leaf.numel() for leaf in trained.values()),
        (many - few) / 8 - width * width,
        2 * few - many,
        sum(leaf.numel() for leaf in constants.values()),
        seconds,
    )


def _loss(y: torch.Tensor, _: object) -> torch.Tensor:
    return y.square().mean()


def _products(layer: nn.Module, params: Params, tokens: int) -> int:
    """The multiply-adds of a call; a transposed x keeps products apart that would be fused."""
    x = torch.ones(layer[0].in_features, tokens).t()  # type: ignore[index]
    with FlopCounterMode(display=False) as counter:
        fcall(layer, params, x)
    flops: int = counter.get_total_flops()
    return flops // 2
