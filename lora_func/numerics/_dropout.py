"""Dropout in the input of a trained term."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DROPOUT = "_dropout"
"""The constant leaf of a site that holds the probability; a site without dropout has none."""


def dropout_leaf(rate: float) -> dict[str, Tensor]:
    """Return the leaf of a probability; nothing for 0."""
    return {DROPOUT: torch.tensor(rate, dtype=torch.float64)} if rate else {}


def dropout_setting(name: str, leaves: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the probability of a site as a setting of PEFT; nothing without dropout."""
    rate = leaves.get(DROPOUT)
    # the short decimal number that a leaf in single precision stands for
    return {} if rate is None else {name: float(f"{rate.item():.7g}")}


def dropout(x: Any, rate: Tensor | None) -> Any:
    """Set elements to zero with a probability, and scale the others up.

    The random numbers are torch's global ones, as in ``torch.nn.Dropout``. Under ``torch.vmap`` its
    argument ``randomness`` decides; in a sweep each adapter gets numbers of its own.

    Args:
        x: Activations; (K, n, d) for K adapters. What stands for activations drops by itself.
        rate: The probability, shape () or (K,); None for no dropout.

    Returns:
        The shape and dtype of x.
    """
    if rate is None:
        return x
    if not isinstance(x, Tensor):
        return x.dropped(rate)
    rate = (rate[:, None, None] if rate.ndim else rate).to(torch.float32)
    kept = torch.rand(x.shape, dtype=torch.float32, device=x.device) >= rate
    return x * (kept / (1 - rate)).to(x.dtype)
