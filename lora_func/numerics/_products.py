"""What adapters do to a frozen layer's input and output, in as little memory as it takes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_func.runtime._transforms import autocasts, transformed
from lora_func.weights._layers import Affine, Weight, linear


def beside(
    x: Tensor,
    W: Weight,
    down: Tensor,
    up: Tensor,
    between: Callable[[Tensor], Tensor] | None = None,
    gain: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Compute ``x Wᵀ + b + gain * scale * (between(x downᵀ) upᵀ)`` in the dtype of x.

    Where autograd alone looks on, the second product is added to the first in its own memory, and
    so are their gradients in x.

    Args:
        x: Shape (..., d_in); (K, n, d_in) for factors with an axis of adapters in front.
        W: The frozen weight, or the weight with its bias.
        down: Shape (r, d_in), or (K, r, d_in).
        up: Shape (d_out, r), or (K, d_out, r).
        between: What happens in the narrow place, (..., r) -> (..., r); nothing if left out.
        gain: Of each output of the second product, shape (d_out,) or (K, 1, d_out); 1 if left out.
        scale: Of the second product, shape () or (K,); 1 if left out.

    Returns:
        Shape (..., d_out).
    """
    if x.dtype.itemsize < 4:  # on the activations it could overflow, and is less precise
        up, scale = scaled(up, scale), None
    down, up = down.to(x.dtype), up.to(x.dtype)
    weight: Any
    weight, bias = W if isinstance(W, Affine) else (W, None)
    plain = is_plain(x, weight, bias)
    if plain and between is None and gain is None:
        fused: Tensor = _Beside.apply(x, weight, bias, down, up, scale)  # type: ignore[no-untyped-call]
        return fused
    up = scaled(up, scale)
    rows = _rows(x, down) if plain else x
    y, h = linear(rows, W), torch.matmul(rows, down.mT)
    h = h if between is None else between(h).to(h.dtype)
    gain = None if gain is None else gain.to(y.dtype)
    if not plain:
        added = h @ up.mT
        return y + added if gain is None else torch.addcmul(y, added, gain)
    y = _add(y, h, up) if gain is None else y.addcmul_(h @ up.mT, gain)
    return y.view(*x.shape[:-1], y.shape[-1])


def scaled(t: Tensor, scale: Tensor | None) -> Tensor:
    """Multiply matrices (..., n, m) by a scale each, shape (...), which may be left out."""
    if scale is None:
        return t
    scale = scale.to(t.dtype)
    return t * (scale[..., None, None] if scale.ndim else scale)


def _rows(x: Tensor, down: Tensor) -> Tensor:
    return x.flatten(0, -2) if down.ndim == 2 else x


def _add(y: Tensor, h: Tensor, up: Tensor) -> Tensor:
    return y.addmm_(h, up.mT) if up.ndim == 2 else y.baddbmm_(h, up.mT)


def gained(y: Tensor, gain: Tensor) -> Tensor:
    """Compute ``gain * y``, as precise as the gain, and exactly y where that is one.

    Args:
        y: Shape (..., d).
        gain: Shape (d,) or (K, 1, d).

    Returns:
        The shape and dtype of y.
    """
    if gain.dtype == y.dtype:
        return y * gain
    more = (gain - 1).to(y.dtype)
    if not _is_alone(y):
        return torch.addcmul(y, more, y)
    fused: Tensor = _Gained.apply(y, more)  # type: ignore[no-untyped-call]
    return fused


def _is_alone(x: Tensor) -> bool:
    """Whether nobody but autograd looks on."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and not autocasts(x)
        and not transformed()
    )


def is_plain(x: Tensor, weight: Any, bias: Tensor | None) -> bool:
    """Tell whether autograd alone looks on, at a frozen and dense layer and at rows in a row.

    There a product may be an autograd function of its own, and write into what it has made.

    Args:
        x: The layer's input.
        weight: Its weight.
        bias: Its bias.

    Returns:
        Whether it is so.
    """
    return (
        _is_alone(x)
        and type(weight) in _PLAIN
        and x.ndim > 1
        and x.is_contiguous()
        and x.dtype == weight.dtype
        and not weight.requires_grad
        and not (bias is not None and bias.requires_grad)
    )


_PLAIN = (Tensor, nn.Parameter)


def unviewed(y: Tensor, rows: Sequence[int]) -> Tensor:
    """Lay out the rows of a Function's output; into a view of it nobody could write.

    Args:
        y: Shape (n, d).
        rows: A shape of n rows.

    Returns:
        Shape (*rows, d), in the memory of y.
    """
    laid_out: Tensor = torch.ops.aten._unsafe_view.default(y, (*rows, y.shape[-1]))
    return laid_out


class _Gained(torch.autograd.Function):
    """``y + more * y``, whose gradient in y is one tensor, and not the sum of two."""

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
        # of a single row the sum is the product itself
        of_more = product.sum_to_size(more.shape).clone()
        return torch.addcmul(gradient, more, gradient, out=product), of_more


class _Beside(torch.autograd.Function):
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
        return unviewed(y, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, scale, h = ctx.saved_tensors
        rows = _rows(x, down)
        of_x = of_down = of_up = None
        of_y = of_y.reshape(*rows.shape[:-1], len(weight))
        of_h = scaled(up.mT @ of_y.mT, scale)
        if ctx.needs_input_grad[4]:
            # h is no input, and has no derivative of its own
            h = scaled(down @ rows.mT, scale) if torch.is_grad_enabled() else h
            of_up = (h @ of_y).mT
        if ctx.needs_input_grad[3]:
            of_down = of_h @ rows
        if ctx.needs_input_grad[0]:
            of_x = of_h.mT @ down
            of_x.flatten(0, -2).addmm_(of_y.flatten(0, -2), weight)
            of_x = of_x.view(x.shape)
        return of_x, None, None, of_down, of_up, None
