"""A frozen layer as the affine map ``x -> x Wᵀ + b``."""

from typing import Any, NamedTuple, TypeAlias

import torch.nn.functional as F
from torch import Tensor, device, dtype

from lora_func.modules import whole
from lora_func.weights._packed import Packed
from lora_func.weights._quantised import quantised_linear, quantised_matmul


class Affine(NamedTuple):
    """A frozen layer ``x -> x Wᵀ + b``, as a variant sees it.

    The bias travels with the weight: one fused kernel call rounds differently from a product and a
    sum, and an adapter at its start must equal the layer bit for bit.

    Attributes:
        weight: ``W``, shape (d_out, d_in); packed if the layer is quantised.
        bias: ``b``, shape (d_out,), or None.
        taps: How many columns belong to one channel of a convolution, one after another; 1 for any
            other layer.
        looks_up: True for an embedding, whose inputs stand for one-hot rows.
    """

    weight: Tensor | Packed
    bias: Tensor | None = None
    taps: int = 1
    looks_up: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        d_out, d_in = self.weight.shape
        return d_out, d_in

    @property
    def dtype(self) -> dtype:
        """The dtype in which the layer computes."""
        return self.weight.dtype

    @property
    def device(self) -> device:
        """The device of the weight."""
        return self.weight.device


Weight: TypeAlias = Tensor | Affine


def linear(x: Tensor, W: Weight) -> Tensor:
    """Apply a frozen layer: ``x Wᵀ``, plus the bias if ``W`` carries one.

    Args:
        x: Activations, shape (..., d_in).
        W: The frozen weight, or the weight with its bias.

    Returns:
        Shape (..., d_out).
    """
    weight, bias = (W.weight, W.bias) if isinstance(W, Affine) else (W, None)
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    return quantised_linear(x, weight, bias)


def matmul_weight(A: Tensor, W: Weight) -> Tensor:
    """Compute ``A Wᵀ`` for a matrix that is not an activation: an 8-bit layer rounds activations.

    Args:
        A: Shape (..., d_in).
        W: The frozen weight; its bias is left out.

    Returns:
        Shape (..., d_out), in the dtype of W.
    """
    weight, A = W.weight if isinstance(W, Affine) else W, A.to(W.dtype)
    return F.linear(A, weight) if isinstance(weight, Tensor) else quantised_matmul(A, weight)


def dense(W: Weight) -> Tensor:
    """Return a frozen weight as an ordinary tensor, which must not be written to.

    Args:
        W: The frozen weight, or the weight with its bias.

    Returns:
        Shape (d_out, d_in); dequantised if the layer is quantised, whole if it is spread over
        devices.
    """
    weight = W.weight if isinstance(W, Affine) else W
    return whole(weight) if isinstance(weight, Tensor) else weight.dense(weight.dtype)


def bias_of(W: Weight) -> Tensor | None:
    """Return the bias that a frozen weight carries, or None."""
    return W.bias if isinstance(W, Affine) else None


def taps_of(W: Weight) -> int:
    """Return how many columns of a weight belong to one channel of a convolution; else 1."""
    return W.taps if isinstance(W, Affine) else 1


def looks_up(W: Weight) -> bool:
    """True for the weight of an embedding, whose inputs stand for one-hot rows."""
    return isinstance(W, Affine) and W.looks_up


def is_stack(W: object) -> bool:
    """True for a stack of matrices (n, d_out, d_in), as ``matrix`` reads stacked experts."""
    return isinstance(W, Affine) and len(W.weight.shape) == 3


def matrices(W: Any) -> list[Any]:
    """Return the matrices of a stack, each with its bias; anything else as a list of one."""
    if not is_stack(W):
        return [W]
    biases = [None] * len(W.weight) if W.bias is None else whole(W.bias)
    return [Affine(weight, bias) for weight, bias in zip(whole(W.weight), biases, strict=True)]
