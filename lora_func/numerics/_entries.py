"""A sparse change of a weight, with as few dense matrices as possible."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_func.compat import gradient_of_entries, reshape_unsafe
from lora_func.numerics._products import can_fuse
from lora_func.weights import Affine, Weight, linear


def prepare_entries(
    values: Tensor, indices: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Bring entries into the form that ``add_entries`` takes.

    Args:
        values: Shape (sites, nnz), or (sites, K, nnz) of K adapters.
        indices: Their rows and columns, shape (sites, 2, nnz) or (sites, K, 2, nnz).
        shape: (d_out, d_in).
        dtype: The dtype of the activations.

    Returns:
        values, rows and columns; with one adapter places, in the flattened matrix. With K adapters
        the entries are sorted by row, indices count the rows and columns of all adapters, and there
        are the first entry of each row and of each column, and the entries' order by column.
    """
    d_out, d_in = shape
    rows, columns = indices.to(torch.int32).unbind(-2)
    values = values.to(dtype)
    if values.ndim == 2:
        places = torch.add(columns, rows.long(), alpha=d_in)
        return {"values": values, "rows": rows, "columns": columns, "places": places}
    adapters = values.shape[1]
    adapter = torch.arange(adapters, dtype=torch.int32, device=values.device)[:, None]
    rows, by_row = torch.add(rows, adapter, alpha=d_out).flatten(1).sort()
    columns = torch.add(columns, adapter, alpha=d_in).flatten(1).gather(-1, by_row)
    ascending, order = columns.sort()
    found = {
        "values": values.flatten(1).gather(-1, by_row),
        "rows": rows,
        "columns": columns,
        "starts": _starts(rows, adapters * d_out),
        "order": order,
        "rows_by_column": rows.gather(-1, order),
        "column_starts": _starts(ascending, adapters * d_in),
    }
    shape = (len(values), adapters, -1)
    return {name: tensor.view(shape) for name, tensor in found.items()}


def _starts(ascending: Tensor, size: int) -> Tensor:
    """The first place of each number from 0 to size - 1 in ascending numbers."""
    numbers = torch.arange(size, dtype=torch.int32, device=ascending.device)
    numbers = numbers.repeat(*ascending.shape[:-1], 1)
    return torch.searchsorted(ascending, numbers, out_int32=True)


def add_entries(x: Tensor, W: Weight, entries: Mapping[str, Tensor]) -> Tensor:
    """Compute ``x Wᵀ + b + x Dᵀ`` in the dtype of x, where D has only a few entries.

    If ``can_fuse`` allows it, no matrix of the size of W is kept for the backward pass, the
    gradient of D is computed entry by entry, and a stack builds no such matrix at all.

    Args:
        x: Shape (..., d_in); (K, n, d_in) if the entries have an axis of adapters in front.
        W: The frozen weight, or the weight with its bias.
        entries: What ``prepare_entries`` gives, for one site.

    Returns:
        Shape (..., d_out).
    """
    weight: Any
    weight, bias = (W.weight, W.bias) if isinstance(W, Affine) else (W, None)
    values = entries["values"].to(x.dtype)
    if x.numel() and can_fuse(x, weight, bias):
        y: Tensor = _AddEntries.apply(x, weight, bias, values, entries)  # type: ignore[no-untyped-call]
        return y
    if values.ndim == 1 and isinstance(weight, Tensor) and _is_exact(weight):
        return linear(x, Affine(_added(weight, values, entries), bias))
    return linear(x, W) + x @ _matrix(values, entries, W.shape).mT


def _is_exact(weight: Tensor) -> bool:
    """Whether ``W + D`` keeps the precision of D."""
    return weight.dtype.itemsize >= 4


def _added(weight: Tensor, values: Tensor, entries: Mapping[str, Tensor]) -> Tensor:
    """``W + D``."""
    flat = weight.reshape(-1).scatter_add(0, entries["places"], values.to(weight.dtype))
    return flat.view(weight.shape)


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


def _matrix(values: Tensor, entries: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """D, shape (..., d_out, d_in), in the dtype of the values (..., nnz)."""
    zeros = values.new_zeros(*values.shape[:-1], shape[0] * shape[1])
    D = zeros.scatter(-1, _places(entries, shape), values)
    return D.view(*values.shape[:-1], *shape)


def _places(entries: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    if "places" in entries:
        return entries["places"]
    rows, columns = entries["rows"].long() % shape[0], entries["columns"].long() % shape[1]
    return rows * shape[1] + columns


class _AddEntries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        entries: Mapping[str, Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x, weight, values)
        ctx.entries = entries
        rows = x.flatten(0, -2)
        if values.ndim > 1:
            y = _sums(values, entries["columns"], entries["starts"], _features(x, values))
            y = _add_sums(F.linear(rows, weight, bias), y)
        elif _is_exact(weight):
            y = F.linear(rows, _added(weight, values, entries), bias)
        else:
            D = _matrix(values, entries, weight.shape)
            y = F.linear(rows, weight, bias).addmm_(rows, D.mT)
        return reshape_unsafe(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, values), entries = ctx.saved_tensors, ctx.entries
        if torch.is_grad_enabled():
            return _twice_differentiable(of_y, x, weight, values, entries)
        of_x = of_values = None
        gradient = _features(of_y, values)
        if ctx.needs_input_grad[3]:
            # the kernel of CUDA has no bfloat16
            dtype = torch.promote_types(of_y.dtype, torch.float32) if of_y.is_cuda else of_y.dtype
            rows, columns = entries["rows"].flatten(), entries["columns"].flatten()
            inputs = _features(x, values).to(dtype)
            of_values = gradient_of_entries(gradient.to(dtype), inputs, rows, columns)
            of_values = of_values.view(values.shape).to(values.dtype)
        if ctx.needs_input_grad[0]:
            of_x = _of_input(of_y.flatten(0, -2), weight, values, entries, gradient).view(x.shape)
        return of_x, None, None, of_values, None


def _of_input(
    of_y: Tensor,
    weight: Tensor,
    values: Tensor,
    entries: Mapping[str, Tensor],
    gradient: Tensor,
) -> Tensor:
    if values.ndim > 1:
        by_column = values.flatten().index_select(0, entries["order"].flatten())
        sums = _sums(by_column, entries["rows_by_column"], entries["column_starts"], gradient)
        return _add_sums(of_y @ weight, sums)
    if _is_exact(weight):
        return of_y @ _added(weight, values, entries)
    return (of_y @ weight).addmm_(of_y, _matrix(values, entries, weight.shape))


def _features(x: Tensor, values: Tensor) -> Tensor:
    """The features of activations (K, n, d) as rows, shape (K d, n)."""
    adapters = values.shape[:-1].numel()
    return x.reshape(adapters, -1, x.shape[-1]).mT.flatten(0, 1).contiguous()


def _sums(values: Tensor, places: Tensor, starts: Tensor, features: Tensor) -> Tensor:
    """Add up entries times features, one sum for each start, shape (K, d, n)."""
    weights = values.flatten()
    sums = F.embedding_bag(
        places.flatten(), features, starts.flatten(), mode="sum", per_sample_weights=weights
    )
    return sums.view(*starts.shape, -1)


def _add_sums(y: Tensor, sums: Tensor) -> Tensor:
    """Add sums (K, d, n) to activations (K n, d)."""
    y.view(len(sums), -1, y.shape[-1]).add_(sums.mT)
    return y


def _twice_differentiable(
    of_y: Tensor, x: Tensor, weight: Tensor, values: Tensor, entries: Mapping[str, Tensor]
) -> tuple[Tensor | None, ...]:
    adapters = values.shape[:-1]
    of_x = of_y @ weight + of_y @ _matrix(values, entries, weight.shape)
    of_D = of_y.reshape(*adapters, -1, len(weight)).mT @ x.reshape(*adapters, -1, x.shape[-1])
    of_values = of_D.flatten(-2).gather(-1, _places(entries, weight.shape))
    return of_x, None, None, of_values, None
