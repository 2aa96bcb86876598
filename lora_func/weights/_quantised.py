"""Products with quantised weights, under every transform of torch.func.

bitsandbytes' own autograd functions support no torch.func transform, and its bare kernels silently
lose tangents and gradients. Here the kernels compute the product. The weight is frozen, so the
derivative is a product with the dequantised weight, which is computed each time and never kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_func.compat import needs_math
from lora_func.weights._packed import Packed, Packed4


def quantised_linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """Apply a quantised layer: ``x Wᵀ + b``, in its own dtype.

    Args:
        x: Activations, shape (..., d_in).
        weight: The weight.
        bias: The bias, shape (d_out,), or None.

    Returns:
        Shape (..., d_out), in the dtype that bitsandbytes gives.
    """
    dtype = weight.compute_dtype or x.dtype
    bias = None if bias is None else bias.to(dtype)
    y: Tensor
    if not torch.compiler.is_compiling():
        y = _Linear.apply(x.to(dtype), bias, weight, False)  # type: ignore[no-untyped-call]
    # the compiler supports no Function with forward mode, and a Function without it has no jvp
    elif needs_math():
        y = F.linear(x.to(dtype), weight.dense(dtype), bias)
    else:
        y = _CompiledLinear.apply(x.to(dtype), bias, weight)  # type: ignore[no-untyped-call]
    return y.to(x.dtype) if isinstance(weight, Packed4) else y


def quantised_matmul(x: Tensor, weight: Packed) -> Tensor:
    """Compute ``x Wᵀ`` with the dequantised weight, without rounding ``x``.

    Args:
        x: Shape (..., d_in).
        weight: The weight.

    Returns:
        Shape (..., d_out), in the dtype of x.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, weight.dense(x.dtype))
    return _matmul(x, weight, True)


def _matmul(x: Tensor, weight: Packed, transposed: bool) -> Tensor:
    y: Tensor = _Matmul.apply(x, weight, transposed)  # type: ignore[no-untyped-call]
    return y


class _CompiledLinear(torch.autograd.Function):
    """``x Wᵀ + b`` by bitsandbytes' kernels.

    The compiler cannot look into it. If it could, it would keep a dequantised weight for the
    backward pass.
    """

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, weight: Packed) -> Tensor:
        with torch.no_grad():
            return weight.product(x, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.weight, ctx.dtype = inputs[2], inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        gradient = gradient.to(ctx.dtype)
        return gradient @ ctx.weight.dense(ctx.dtype), _over_rows(gradient), None


class _Linear(torch.autograd.Function):
    """``x Wᵀ + b`` by bitsandbytes' kernels; with ``apart`` once for each ``x[i]``."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, weight: Packed, apart: bool) -> Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], weight.shape[0])
        if apart:
            return torch.stack([weight.product(one, bias) for one in x])
        return weight.product(x, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.weight, ctx.dtypes = inputs[2], (inputs[0].dtype, output.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        of_x, of_bias, *_ = ctx.needs_input_grad
        gradient = gradient.to(ctx.dtypes[0])
        pulled = _matmul(gradient, ctx.weight, False) if of_x else None
        return pulled, _over_rows(gradient) if of_bias else None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, bias: Tensor | None, *_: None) -> Tensor:
        pushed = _matmul(x, ctx.weight, True)
        return (pushed if bias is None else pushed + bias).to(ctx.dtypes[1])

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        bias: Tensor | None,
        weight: Packed,
        apart: bool,
    ) -> tuple[Tensor, int]:
        of_x, of_bias, *_ = in_dims
        fused = bias if of_bias is None else None
        x = x[None] if of_x is None else x.movedim(of_x, 0)
        groups = x.shape[: 1 + apart]
        if weight.mixes_rows:
            y = _Linear.apply(x.flatten(0, len(groups) - 1), fused, weight, True)  # type: ignore[no-untyped-call]
            y = y.unflatten(0, groups)
        else:
            y = _Linear.apply(x, fused, weight, False)  # type: ignore[no-untyped-call]
        if bias is None or of_bias is None:
            return y, 0
        own = bias.movedim(of_bias, 0)
        return y + own.view(len(own), *[1] * (y.ndim - 2), -1), 0


class _Matmul(torch.autograd.Function):
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
        return _matmul(gradient, ctx.weight, not ctx.transposed), None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: None) -> Tensor:
        return _matmul(x, ctx.weight, ctx.transposed)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None], x: Tensor, weight: Packed, transposed: bool
    ) -> tuple[Tensor, int]:
        return _matmul(x.movedim(in_dims[0], 0), weight, transposed), 0


def _over_rows(gradient: Tensor) -> Tensor:
    return gradient.reshape(-1, gradient.shape[-1]).sum(0)
