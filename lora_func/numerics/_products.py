"""Products beside a frozen layer, with as few temporaries of the layer's width as possible."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_func.compat import autocasts, reshape_unsafe, transformed
from lora_func.numerics._dropout import dropout
from lora_func.numerics._linalg import along_rows
from lora_func.weights import Affine, Weight, linear


def add_low_rank(
    x: Tensor,
    W: Weight,
    down: Tensor,
    up: Tensor,
    middle: Tensor | None = None,
    gain: Tensor | None = None,
    rate: Tensor | None = None,
    bottleneck: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Compute ``x Wᵀ + b + gain * (bottleneck(middle * x downᵀ) upᵀ)`` in the dtype of x.

    If ``can_fuse`` allows it, the second product is added to the memory of the first, and so are
    their gradients with respect to x.

    Args:
        x: Shape (..., d_in); (K, n, d_in) if the factors have an axis of adapters in front.
        W: The frozen weight, or the weight with its bias.
        down: Shape (r, d_in), or (K, r, d_in).
        up: Shape (d_out, r), or (K, d_out, r).
        middle: A factor for each output of ``x downᵀ``, shape (r,) or (K, r); None for none.
        gain: A factor for each output of the second product, shape (d_out,) or (K, d_out).
        rate: The probability of dropout in the second product's x, shape () or (K,); None for none.
        bottleneck: A function of what stands between the factors, (..., r) -> (..., r).

    Returns:
        Shape (..., d_out).
    """
    if down.dtype != x.dtype or up.dtype != x.dtype:
        down, up = down.to(x.dtype), up.to(x.dtype)
    middle = None if middle is None else along_rows(middle).to(x.dtype)
    weight: Any
    weight, bias = (W.weight, W.bias) if isinstance(W, Affine) else (W, None)
    fuses = can_fuse(x, weight, bias)
    if fuses and bottleneck is None and rate is None:
        gain = None if gain is None else along_rows(gain).to(x.dtype)
        fused: Tensor = _AddLowRank.apply(x, weight, bias, down, up, middle, gain)  # type: ignore[no-untyped-call]
        return fused
    rows = _rows(x, down) if fuses else x
    y, h = linear(rows, W), torch.matmul(dropout(rows, rate), down.mT)
    h = h if middle is None else h * middle.to(h.dtype)
    h = h if bottleneck is None else bottleneck(h).to(h.dtype)
    if gain is not None:
        y = torch.addcmul(y, h @ up.mT, along_rows(gain).to(y.dtype))
    else:
        y = _add(y, h, up) if fuses else y + h @ up.mT
    return y.view(*x.shape[:-1], y.shape[-1]) if fuses else y


def low_rank_term(x: Any, down: Tensor, up: Tensor) -> Tensor:
    """Compute ``x downᵀ upᵀ`` in the dtype of x.

    Args:
        x: Shape (..., d_in); (K, n, d_in) if the factors have an axis of adapters in front.
        down: Shape (r, d_in), or (K, r, d_in).
        up: Shape (d_out, r), or (K, d_out, r).

    Returns:
        Shape (..., d_out).
    """
    return torch.matmul(x, down.to(x.dtype).mT) @ up.to(x.dtype).mT


def scaled(t: Tensor, scale: Tensor | None) -> Tensor:
    """Multiply each matrix of (..., n, m) by its scale, shape (...); None leaves them."""
    if scale is None:
        return t
    scale = scale.to(t.dtype)
    return t * (scale[..., None, None] if scale.ndim else scale)


def _rows(x: Tensor, down: Tensor) -> Tensor:
    return x.flatten(0, -2) if down.ndim == 2 else x


def _add(y: Tensor, h: Tensor, up: Tensor) -> Tensor:
    return y.addmm_(h, up.mT) if up.ndim == 2 else y.baddbmm_(h, up.mT)


def scale_output(y: Tensor, gain: Tensor, more: Tensor | None) -> Tensor:
    """Compute ``gain * y``; a gain of 1 gives exactly y.

    Args:
        y: Shape (..., d).
        gain: Shape (d,), or (K, d) of K adapters.
        more: ``gain - 1`` in the dtype of y, if the gain has another dtype.

    Returns:
        The shape and dtype of y.
    """
    return y * along_rows(gain) if more is None else add_scaled(y, more)


def add_scaled(y: Tensor, more: Tensor) -> Tensor:
    """Compute ``y + more * y``, that is y with a gain of ``1 + more``; 0 gives exactly y.

    Args:
        y: Shape (..., d).
        more: Shape (d,), or (K, d) of K adapters.

    Returns:
        The shape and dtype of y.
    """
    more = along_rows(more)
    if not is_eager(y):
        return torch.addcmul(y, more.to(y.dtype), y)
    fused: Tensor = _AddScaled.apply(y, more)  # type: ignore[no-untyped-call]
    return fused


def is_eager(x: Any) -> bool:
    """Whether only autograd records this: no compiler, no transform, no autocast, no subclass."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and not autocasts(x)
        and not transformed()
    )


def can_fuse(x: Tensor, weight: Any, bias: Tensor | None) -> bool:
    """True if the fused path is allowed.

    That is eager mode, no torch.func transform, no autocast, a frozen dense weight and a contiguous
    input. A product may then be an autograd function that writes into its own output.

    Args:
        x: The layer's input.
        weight: Its weight.
        bias: Its bias.

    Returns:
        Whether the fused path is allowed.
    """
    return (
        is_eager(x)
        and type(weight) in _PLAIN
        and x.ndim > 1
        and x.is_contiguous()
        and x.dtype == weight.dtype
        and not weight.requires_grad
        and not (bias is not None and bias.requires_grad)
    )


_PLAIN = (Tensor, nn.Parameter)


class _AddScaled(torch.autograd.Function):
    """``y + more * y`` with a single tensor as the gradient of y, in place of a sum of two."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, more: Tensor) -> Tensor:
        factor = more.to(y.dtype)
        ctx.save_for_backward(y, more, factor)
        return torch.addcmul(y, factor, y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        y, more, factor = ctx.saved_tensors
        product = gradient * y
        of_more = _over_rows(product, more)
        if torch.is_grad_enabled():
            return torch.addcmul(gradient, more.to(y.dtype), gradient), of_more
        return torch.addcmul(gradient, factor, gradient, out=product), of_more


def _over_rows(product: Tensor, factor: Tensor) -> Tensor:
    """Sum products (..., d) for the gradient of a factor, shape (d,) or (K, 1, d)."""
    if product.ndim == 1:
        return product.to(factor.dtype, copy=True)
    axes = (1,) if factor.ndim == 3 else (*range(product.ndim - 1),)
    return product.sum(axes, keepdim=factor.ndim == 3, dtype=factor.dtype)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        middle: Tensor | None,
        gain: Tensor | None,
    ) -> Tensor:
        rows, added = _rows(x, down), None
        h = _product(rows, down, middle)
        inner = _times(h, middle)
        y = F.linear(x.flatten(0, -2), weight, bias)
        together = y.view(*rows.shape[:-1], len(weight))
        if gain is None:
            _add(together, inner, up)
        else:
            added = inner @ up.mT
            together.addcmul_(added, gain)
        ctx.save_for_backward(x, weight, down, up, middle, gain, h, added)
        return reshape_unsafe(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, middle, gain, h, added = ctx.saved_tensors
        rows = _rows(x, down)
        of_x = of_down = of_up = of_middle = of_gain = None
        of_y = of_y.reshape(*rows.shape[:-1], len(weight))
        needs_x, _, _, needs_down, needs_up, needs_middle, needs_gain = ctx.needs_input_grad
        if torch.is_grad_enabled():  # what was saved on the way has no derivative
            h = _product(rows, down, middle)
            added = None if gain is None else _times(h, middle) @ up.mT
        if needs_gain:
            of_gain = _over_rows(of_y * added, gain)
        of_added = of_y if gain is None else of_y * gain
        of_inner = _product(of_added, up.mT, middle)
        if needs_up:
            of_up = (_times(h, middle).mT @ of_added).mT
        if needs_middle:
            of_middle = _over_rows(of_inner * h, middle)
        of_h = _times(of_inner, middle)
        if needs_down:
            of_down = of_h.mT @ rows
        if needs_x:
            of_x = of_h @ down
            of_x.flatten(0, -2).addmm_(of_y.flatten(0, -2), weight)
            of_x = of_x.view(x.shape)
        return of_x, None, None, of_down, of_up, of_middle, of_gain


def _product(rows: Tensor, factor: Tensor, middle: Tensor | None) -> Tensor:
    """``rows factorᵀ``; with few columns it is faster in the memory of its transpose."""
    return (factor @ rows.mT).mT if middle is None else rows @ factor.mT


def _times(h: Tensor, middle: Tensor | None) -> Tensor:
    return h if middle is None else h * middle
