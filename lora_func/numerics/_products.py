"""Products beside a frozen layer, with as few temporaries of the layer's width as possible."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_func.compat import autocasts, reshape_unsafe, transformed
from lora_func.numerics._dropout import dropout
from lora_func.weights import Affine, Weight, linear


def add_low_rank(
    x: Tensor,
    W: Weight,
    down: Tensor,
    up: Tensor,
    bottleneck: Callable[[Tensor], Tensor] | None = None,
    gain: Tensor | None = None,
    scale: Tensor | None = None,
    rate: Tensor | None = None,
) -> Tensor:
    """Compute ``x Wᵀ + b + gain * scale * (bottleneck(x downᵀ) upᵀ)`` in the dtype of x.

    If ``can_fuse`` allows it, the second product is added to the memory of the first, and so are
    their gradients with respect to x.

    Args:
        x: Shape (..., d_in); (K, n, d_in) if the factors have an axis of adapters in front.
        W: The frozen weight, or the weight with its bias.
        down: Shape (r, d_in), or (K, r, d_in).
        up: Shape (d_out, r), or (K, d_out, r).
        bottleneck: A function of ``x downᵀ``, (..., r) -> (..., r); None for the identity.
        gain: A factor for each output of the second product, shape (d_out,) or (K, 1, d_out).
        scale: A factor of the second product, shape () or (K,).
        rate: The probability of dropout in the second product's x, shape () or (K,); None for none.

    Returns:
        Shape (..., d_out).
    """
    if x.dtype.itemsize < 4:  # on half-precision activations the scale could overflow
        up, scale = scaled(up, scale), None
    down, up = down.to(x.dtype), up.to(x.dtype)
    weight: Any
    weight, bias = (W.weight, W.bias) if isinstance(W, Affine) else (W, None)
    fuses = can_fuse(x, weight, bias)
    if fuses and bottleneck is None and gain is None and rate is None:
        fused: Tensor = _AddLowRank.apply(x, weight, bias, down, up, scale)  # type: ignore[no-untyped-call]
        return fused
    up = scaled(up, scale)
    rows = _rows(x, down) if fuses else x
    y, h = linear(rows, W), torch.matmul(dropout(rows, rate), down.mT)
    h = h if bottleneck is None else bottleneck(h).to(h.dtype)
    gain = None if gain is None else gain.to(y.dtype)
    if not fuses:
        added = h @ up.mT
        return y + added if gain is None else torch.addcmul(y, added, gain)
    y = _add(y, h, up) if gain is None else y.addcmul_(h @ up.mT, gain)
    return y.view(*x.shape[:-1], y.shape[-1])


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


def scale_output(y: Tensor, gain: Tensor) -> Tensor:
    """Compute ``gain * y`` with the precision of the gain; a gain of 1 gives exactly y.

    Args:
        y: Shape (..., d).
        gain: Shape (d,) or (K, 1, d).

    Returns:
        The shape and dtype of y.
    """
    if gain.dtype == y.dtype:
        return y * gain
    more = (gain - 1).to(y.dtype)
    if not _is_eager(y):
        return torch.addcmul(y, more, y)
    fused: Tensor = _ScaleOutput.apply(y, more)  # type: ignore[no-untyped-call]
    return fused


def _is_eager(x: Tensor) -> bool:
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
        _is_eager(x)
        and type(weight) in _PLAIN
        and x.ndim > 1
        and x.is_contiguous()
        and x.dtype == weight.dtype
        and not weight.requires_grad
        and not (bias is not None and bias.requires_grad)
    )


_PLAIN = (Tensor, nn.Parameter)


class _ScaleOutput(torch.autograd.Function):
    """``y + more * y`` with a single tensor as the gradient of y, in place of a sum of two."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, more: Tensor) -> Tensor:
        ctx.save_for_backward(y, more)
        return torch.addcmul(y, more, y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        y, more = ctx.saved_tensors
        if torch.is_grad_enabled():
            return torch.addcmul(gradient, more, gradient), (gradient * y).sum_to_size(more.shape)
        product = gradient * y
        # with a single row the sum is the product itself, which is overwritten below
        of_more = product.sum_to_size(more.shape).clone()
        return torch.addcmul(gradient, more, gradient, out=product), of_more


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: Tensor | None,
    ) -> Tensor:
        rows = _rows(x, down)
        h = scaled(down @ rows.mT, scale)
        ctx.save_for_backward(x, weight, down, up, scale, h)
        y = F.linear(x.flatten(0, -2), weight, bias)
        _add(y.view(*rows.shape[:-1], len(weight)), h.mT, up)
        return reshape_unsafe(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, scale, h = ctx.saved_tensors
        rows = _rows(x, down)
        of_x = of_down = of_up = None
        of_y = of_y.reshape(*rows.shape[:-1], len(weight))
        of_h = scaled(up.mT @ of_y.mT, scale)
        if ctx.needs_input_grad[4]:
            # the saved h has no derivative: double backward computes it again
            h = scaled(down @ rows.mT, scale) if torch.is_grad_enabled() else h
            of_up = (h @ of_y).mT
        if ctx.needs_input_grad[3]:
            of_down = of_h @ rows
        if ctx.needs_input_grad[0]:
            of_x = of_h.mT @ down
            of_x.flatten(0, -2).addmm_(of_y.flatten(0, -2), weight)
            of_x = of_x.view(x.shape)
        return of_x, None, None, of_down, of_up, None
