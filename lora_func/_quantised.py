"""Products with quantised weights that every transform goes through.

bitsandbytes' own autograd functions know no torch.func transform, and its kernels, called without
them, lose tangents and gradients unnoticed. Here its kernels compute the product, and the
derivative, which a frozen weight makes linear, is a product with the dequantised weight; that one
is made anew each time and never kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_func._packed import Packed
from lora_func._transforms import needs_math


def quantised_linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """Apply a quantised layer: ``x Wᵀ + b``, in its own dtype.

    Args:
        x: Activations, shape (..., d_in).
        weight: The weight.
        bias: The bias, shape (d_out,), or None.

    Returns:
        Shape (..., d_out), in the dtype of x.
    """
    dtype = weight.compute_dtype or x.dtype
    bias = None if bias is None else bias.to(dtype)
    if torch.compiler.is_compiling():
        return _compiled(x.to(dtype), weight, bias).to(x.dtype)
    y: Tensor = _Linear.apply(x.to(dtype), bias, weight)  # type: ignore[no-untyped-call]
    return y.to(x.dtype)


def quantised_times(x: Tensor, weight: Packed) -> Tensor:
    """Compute ``x Wᵀ`` with the dequantised weight: for an ``x`` that is not to be rounded.

    Args:
        x: Shape (..., d_in).
        weight: The weight.

    Returns:
        Shape (..., d_out), in the dtype of x.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, weight.dense(x.dtype))
    return _times(x, weight, True)


def _times(x: Tensor, weight: Packed, transposed: bool) -> Tensor:
    y: Tensor = _Times.apply(x, weight, transposed)  # type: ignore[no-untyped-call]
    return y


def _compiled(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    # the compiler goes through no Function with forward mode, and has none of its own without
    if needs_math():
        return F.linear(x, weight.dense(x.dtype), bias)
    y: Tensor = _CompiledLinear.apply(x, bias, weight)  # type: ignore[no-untyped-call]
    return y


class _CompiledLinear(torch.autograd.Function):
    """``x Wᵀ + b``, of which the dense W is not kept for the backward pass."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, weight: Packed) -> Tensor:
        return F.linear(x, weight.dense(x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.weight = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        dense = ctx.weight.dense(gradient.dtype)
        return gradient @ dense, _over_rows(gradient), None


class _Linear(torch.autograd.Function):
    """``x Wᵀ + b`` by bitsandbytes' kernels."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, weight: Packed) -> Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], weight.shape[0])
        return weight.product(x, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.weight = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_x, of_bias, _ = ctx.needs_input_grad
        return (
            _times(gradient, ctx.weight, False) if of_x else None,
            _over_rows(gradient) if of_bias else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, bias: Tensor | None, _: None) -> Tensor | None:
        y = None if x is None else _times(x, ctx.weight, True)
        return y if bias is None else bias if y is None else y + bias

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, bias: Tensor | None, weight: Packed
    ) -> tuple[Tensor, int]:
        of_x, of_bias, _ = in_dims
        fused = bias if of_bias is None else None
        if of_x is None:
            y = quantised_linear(x, weight, None)[None]
        elif weight.mixes_rows:
            y = torch.stack([quantised_linear(one, weight, fused) for one in x.unbind(of_x)])
        else:
            y = quantised_linear(x.movedim(of_x, 0), weight, fused)
        if bias is None or of_bias is None:
            return y, 0
        own = bias.movedim(of_bias, 0)
        return y + own.view(len(own), *[1] * (y.ndim - 2), -1), 0


class _Times(torch.autograd.Function):
    """``x W`` or ``x Wᵀ``."""

    @staticmethod
    def forward(x: Tensor, weight: Packed, transposed: bool) -> Tensor:
        dense = weight.dense(x.dtype)
        return x @ (dense.mT if transposed else dense)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.weight, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _times(gradient, ctx.weight, not ctx.transposed), None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: None) -> Tensor:
        return _times(x, ctx.weight, ctx.transposed)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None], x: Tensor, weight: Packed, transposed: bool
    ) -> tuple[Tensor, int]:
        return _times(x.movedim(in_dims[0], 0), weight, transposed), 0


def _over_rows(gradient: Tensor) -> Tensor:
    return gradient.reshape(-1, gradient.shape[-1]).sum(0)
