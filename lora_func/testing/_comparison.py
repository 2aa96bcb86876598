"""Comparisons that several laws make."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_func.testing._layers import Layer


def close(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Check that tensors are equal up to rounding in float64."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def refused(message: str, function: Callable[[], object]) -> None:
    """Check that a function raises ValueError, with a message that has a part."""
    error: ValueError | None = None
    try:
        function()
    except ValueError as found:
        error = found
    assert error is not None, "nothing was refused"
    assert message in str(error), f"expected {message!r}, got {error!r}"


def output(layer: Layer) -> Tensor:
    """Run a layer without recording gradients."""
    with torch.no_grad():
        return layer.apply()


def weighted(y: Tensor) -> Tensor:
    """Sum an output with different weights, so that each entry counts."""
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64, device=y.device)
    return (y.flatten() * weights).sum()


def loss(layer: Layer, leaves: Mapping[str, Tensor]) -> Tensor:
    """Compute a scalar that depends on every trained leaf."""
    return weighted(layer.apply(leaves))


def autograd(layer: Layer, leaves: Mapping[str, Tensor]) -> list[Tensor]:
    """Compute the gradients of ``loss`` by autograd; a leaf without a part in it gets zeros."""
    found = torch.autograd.grad(loss(layer, leaves), [*leaves.values()], materialize_grads=True)
    return [*found]
