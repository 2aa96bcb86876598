"""A sparse change of a weight, with as few dense matrices as possible."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_func.compat import gradient_of_entries, reshape_unsafe
from lora_func.numerics._products import can_fuse
from lora_func.weights import Affine, Weight, linear


def add_entries(x: Tensor, W: Weight, values: Tensor, indices: Tensor) -> Tensor:
    """Compute ``x Wᵀ + b + x Dᵀ`` in the dtype of x, where D has only a few entries.

    If ``can_fuse`` allows it, no matrix of the size of W is kept for the backward pass, the
    gradient of D is computed entry by entry, and a stack builds no such matrix at all.

    Args:
        x: Shape (..., d_in); (K, n, d_in) if the entries have an axis of adapters in front.
        W: The frozen weight, or the weight with its bias.
        values: The entries, shape (nnz,) or (K, nnz).
        indices: Their rows and columns, shape (2, nnz) or (K, 2, nnz).

    Returns:
        Shape (..., d_out).
    """
    weight: Any
    weight, bias = (W.weight, W.bias) if isinstance(W, Affine) else (W, None)
    if x.numel() and can_fuse(x, weight, bias):
        y: Tensor = _AddEntries.apply(x, weight, bias, values, indices)  # type: ignore[no-untyped-call]
        return y
    if values.ndim == 1 and isinstance(weight, Tensor) and _is_exact(values, weight):
        return linear(x, Affine(weight_with_entries(weight, values, indices), bias))
    return linear(x, W) + x @ _matrix(values.to(x.dtype), indices, W.shape).mT


def _is_exact(values: Tensor, weight: Tensor) -> bool:
    """Whether ``W + D`` keeps the precision of D."""
    return torch.promote_types(values.dtype, weight.dtype) == weight.dtype


def weight_with_entries(W: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Compute ``W + D``.

    Args:
        W: Shape (d_out, d_in).
        values: Shape (nnz,).
        indices: Shape (2, nnz).

    Returns:
        Shape (d_out, d_in), in the dtype of W.
    """
    rows, columns = indices.long()
    return W.index_put((rows, columns), values.to(W.dtype), accumulate=True)


def _matrix(values: Tensor, indices: Tensor, shape: Sequence[int]) -> Tensor:
    """D, shape (..., d_out, d_in), in the dtype of the values (..., nnz)."""
    zeros = values.new_zeros(*values.shape[:-1], shape[0] * shape[1])
    D = zeros.scatter(-1, _places(indices, shape), values)
    return D.view(*values.shape[:-1], *shape)


def _places(indices: Tensor, shape: Sequence[int]) -> Tensor:
    rows, columns = indices.long().unbind(-2)
    return rows * shape[1] + columns


class _AddEntries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, values, indices)
        y = _product(x, weight, bias, values, indices)
        return reshape_unsafe(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, values, indices = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _twice_differentiable(of_y, x, weight, values, indices)
        of_x = of_values = None
        if ctx.needs_input_grad[3]:
            rows, columns = _block_diagonal(indices, weight.shape)
            # the kernel of CUDA has no bfloat16
            dtype = torch.promote_types(of_y.dtype, torch.float32) if of_y.is_cuda else of_y.dtype
            gradient, inputs = (_features(t, values).to(dtype) for t in (of_y, x))
            of_values = gradient_of_entries(gradient, inputs, rows, columns)
            of_values = of_values.view(values.shape).to(values.dtype)
        if ctx.needs_input_grad[0]:
            of_x = _product(of_y, weight.mT, None, values, indices.flip(-2)).view(x.shape)
        return of_x, None, None, of_values, None


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor
) -> Tensor:
    rows = x.flatten(0, -2)
    if values.ndim == 1 and _is_exact(values, weight):
        return F.linear(rows, weight_with_entries(weight, values, indices), bias)
    y, values = F.linear(rows, weight, bias), values.to(weight.dtype)
    if values.ndim == 1:
        return y.addmm_(rows, _matrix(values, indices, weight.shape).mT)
    return _add_sums(y, _block_diagonal(indices, weight.shape), values, _features(x, values))


def _features(x: Tensor, values: Tensor) -> Tensor:
    """The features of activations (K, n, d) as rows, shape (K d, n)."""
    adapters = values.shape[:-1].numel()
    return x.reshape(adapters, -1, x.shape[-1]).mT.flatten(0, 1).contiguous()


def _block_diagonal(indices: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows and columns, shape (2, K nnz), of a matrix with all adapters' D on its diagonal."""
    indices = indices.long()
    if indices.ndim == 2:
        return indices.contiguous()
    adapters = torch.arange(len(indices), device=indices.device)
    corners = torch.outer(adapters, torch.tensor(shape, device=indices.device))
    return (indices + corners[..., None]).transpose(0, 1).flatten(1).contiguous()


def _add_sums(y: Tensor, indices: Tensor, values: Tensor, features: Tensor) -> Tensor:
    """Add the products of entries with features (K d_in, n) to activations (K n, d)."""
    order = indices[0].argsort()
    rows, columns = indices[:, order]
    adapters, n = len(values), features.shape[-1]
    first = torch.searchsorted(rows, torch.arange(adapters * y.shape[-1], device=rows.device))
    sums = F.embedding_bag(
        columns, features, first, mode="sum", per_sample_weights=values.flatten()[order]
    )
    y.view(adapters, n, -1).add_(sums.view(adapters, -1, n).mT)
    return y


def _twice_differentiable(
    of_y: Tensor, x: Tensor, weight: Tensor, values: Tensor, indices: Tensor
) -> tuple[Tensor | None, ...]:
    adapters = values.shape[:-1]
    of_x = of_y @ weight + of_y @ _matrix(values.to(x.dtype), indices, weight.shape)
    of_D = of_y.reshape(*adapters, -1, len(weight)).mT @ x.reshape(*adapters, -1, x.shape[-1])
    of_values = of_D.flatten(-2).gather(-1, _places(indices, weight.shape))
    return of_x, None, None, of_values.to(values.dtype), None
