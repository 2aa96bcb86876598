"""How layers store their weights: the only file that knows.

Everything else sees a frozen layer as the affine map ``x -> x Wᵀ + b`` with ``W`` of shape (d_out,
d_in) and reads it through :func:`linear` and :func:`dense` alone.
"""

from typing import NamedTuple, TypeAlias

import torch.nn.functional as F
from torch import Tensor, device, dtype, nn


class Affine(NamedTuple):
    """A frozen layer ``x -> x Wᵀ + b``, as a variant sees it.

    The bias travels with the weight because one fused kernel call rounds differently from a product
    and a sum: only so is an adapter that changes nothing equal to the layer bit for bit.

    Attributes:
        weight: ``W``, shape (d_out, d_in).
        bias: ``b``, shape (d_out,), or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        d_out, d_in = self.weight.shape
        return d_out, d_in

    @property
    def dtype(self) -> dtype:
        """What the weight computes in."""
        return self.weight.dtype

    @property
    def device(self) -> device:
        """Where the weight lies."""
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
    return F.linear(x, *W) if isinstance(W, Affine) else F.linear(x, W)


def dense(W: Weight) -> Tensor:
    """Return a frozen weight as an ordinary tensor, which nobody may write into.

    Args:
        W: The frozen weight, or the weight with its bias.

    Returns:
        Shape (d_out, d_in).
    """
    return W.weight if isinstance(W, Affine) else W


def bare(W: Weight) -> Weight:
    """Return a frozen weight without the bias that it may carry."""
    return W._replace(bias=None) if isinstance(W, Affine) else W


def bias_of(W: Weight) -> Tensor | None:
    """Return the bias that a frozen weight carries, or None."""
    return W.bias if isinstance(W, Affine) else None


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear map whose weight we can read.

    A subclass of ``nn.Linear`` with a forward of its own computes something else, and is not.

    Args:
        module: Any module.

    Returns:
        True for ``nn.Linear`` and transformers' ``Conv1D``.
    """
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or _is_conv1d(module)


def affine(module: nn.Module) -> Affine:
    """Read the weight and bias of a linear-like module as they are now; no copy is made."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    return Affine(weight if isinstance(module, nn.Linear) else weight.T, bias)


def _is_conv1d(module: nn.Module) -> bool:
    # by name, so that transformers stays unimported
    found = type(module)
    return found.__name__ == "Conv1D" and found.__module__ == "transformers.pytorch_utils"
