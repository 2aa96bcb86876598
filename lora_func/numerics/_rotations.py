"""Rotations of small blocks: skew-symmetric matrices, the Cayley transform, and its product."""

import math

import torch
from torch import Tensor

from lora_func.numerics._linalg import without_autocast


def skew(upper: Tensor) -> Tensor:
    """Build skew-symmetric matrices ``T - Tᵀ`` from their strict upper triangles, row by row.

    Args:
        upper: Shape (..., b (b - 1) / 2).

    Returns:
        Shape (..., b, b).
    """
    size = (1 + math.isqrt(1 + 8 * upper.shape[-1])) // 2
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    places = (rows * size + columns).expand(upper.shape)
    flat = upper.new_zeros(*upper.shape[:-1], size * size).scatter(-1, places, upper)
    T = flat.view(*upper.shape[:-1], size, size)
    return T - T.mT


def cayley(X: Tensor) -> Tensor:
    """Compute ``E = R - I`` of the rotation ``R = (I - X)⁻¹ (I + X)``, exactly 0 at 0.

    Args:
        X: Skew-symmetric, shape (..., b, b), float32 or better.

    Returns:
        Shape (..., b, b).
    """
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    with without_autocast(X):
        # torch.linalg.solve has wrong second derivatives by jacrev of jacfwd (torch 2.13);
        # inv looks whether eye - X is singular, which it never is, and a GPU waits for that
        inverse: Tensor = torch.linalg.inv_ex(eye - X).inverse
        return 2 * inverse @ X


def rotate_blocks(x: Tensor, E: Tensor) -> Tensor:
    """Multiply each block of the last axis by its own matrix.

    Args:
        x: Shape (..., blocks * b); (K, n, blocks * b) with K adapters.
        E: Shape (blocks, b, b), or (K, blocks, b, b).

    Returns:
        ``x_block @ E_block``, in the shape and dtype of x.
    """
    *adapters, blocks, b, _ = E.shape
    split = x.reshape(*x.shape[:-1], blocks, b)
    split = split.reshape(*adapters, -1, blocks, b).transpose(-3, -2)
    return (split @ E.to(x.dtype)).transpose(-3, -2).reshape(x.shape)
