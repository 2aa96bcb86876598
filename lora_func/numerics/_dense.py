"""Changes of a weight that have no cheaper form than a matrix of its size."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lora_func.weights import Affine, Weight, bias_of, linear


def add_dense(x: Any, W: Weight, change: Tensor, dropped: Any = None) -> Tensor:
    """Compute ``x Wᵀ + b + x changeᵀ``, in one product if the weight is an ordinary tensor.

    Args:
        x: Shape (..., d_in); (K, n, d_in) for K changes.
        W: The frozen weight, or the weight with its bias.
        change: Shape (d_out, d_in), or (K, d_out, d_in).
        dropped: What takes the place of x in the second product; None for x itself.

    Returns:
        Shape (..., d_out).
    """
    weight = W.weight if isinstance(W, Affine) else W
    if not isinstance(weight, Tensor) or dropped is not None:  # a quantised layer rounds its input
        added: Tensor = (x if dropped is None else dropped) @ change.to(x.dtype).mT
        return linear(x, W) + added
    if change.ndim == 2:
        return F.linear(x, weight + change, bias_of(W))
    y: Tensor = x @ (weight + change).mT
    bias = bias_of(W)
    return y if bias is None else y + bias.to(y.dtype)
