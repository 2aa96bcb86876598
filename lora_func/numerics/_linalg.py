"""Mathematics that several variants share."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from einops import einsum
from torch import Generator, Tensor

from lora_func.runtime._transforms import autocasts

SINGULAR = {"_U": "d_out r", "_S": "r", "_Vh": "r d_in"}
"""The leaves of a variant that keeps singular triplets of the weight."""


def at_least_float32(t: Tensor) -> Tensor:
    """Return a tensor in float32 or better, in which small matrices are solved and normalised."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which matrix products keep the dtype of their operands."""
    return torch.autocast(t.device.type, enabled=False) if autocasts(t) else nullcontext()


def kaiming_uniform(rows: int, columns: int, generator: Generator) -> Tensor:
    """Draw from U(-1/√columns, 1/√columns), the same as ``kaiming_uniform_(a=√5)``.

    Returns:
        Shape (rows, columns), float32.
    """
    bound = columns**-0.5
    drawn = torch.empty(rows, columns, dtype=torch.float32, device=generator.device)
    return drawn.uniform_(-bound, bound, generator=generator)


def along_rows(leaf: Tensor) -> Tensor:
    """Lay a leaf (d,), or (K, d) of K adapters, along the rows of activations (..., d)."""
    return leaf if leaf.ndim == 1 else leaf[:, None]


def low_rank_norm(A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """Compute the Frobenius norm of ``s B A`` from two r x r matrices; leading axes are batch axes.

    Returns:
        The norms, float64, with the leading axes of A.
    """
    A, B = A.double(), B.double()
    of_rows = einsum(A, A, "... i d_in, ... j d_in -> ... i j")
    of_columns = einsum(B, B, "... d_out i, ... d_out j -> ... i j")
    return scale.abs() * (of_rows * of_columns).sum((-2, -1)).clamp_min(0).sqrt()


def difference(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """Factor ``B A - B0 A0 = (B - B0) A + B0 (A - A0)``, which is exactly 0 at ``A0, B0``.

    Args:
        A: Shape (r, d_in).
        B: Shape (d_out, r).
        A0: Shape (r, d_in).
        B0: Shape (d_out, r).

    Returns:
        (down, up), shapes (2r, d_in) and (d_out, 2r), with ``up @ down`` the difference.
    """
    return torch.cat([A, A - A0], -2), torch.cat([B - B0, B0], -1)


def refuse_rank_above(r: int, shape: Sequence[int]) -> None:
    """Refuse a rank that a matrix cannot have.

    Raises:
        ValueError: If r exceeds the smaller side.
    """
    if r > min(shape):
        raise ValueError(
            f"r = {r} exceeds min(d_out, d_in) = {min(shape)}; lower r or rank_pattern"
        )


def svd(
    W: Tensor, r: int, niter: int | None = None, generator: Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the r largest singular values and their vectors, in float32 or better.

    Args:
        W: Shape (d_out, d_in).
        r: From 1 to min(d_out, d_in).
        niter: None for the exact decomposition; else the power iterations of the randomised one
            (Halko et al. 2011, https://arxiv.org/abs/0909.4061, alg. 4.4), which samples r columns.
        generator: Draws the sample.

    Returns:
        U (d_out, r), S (r,) in descending order, Vh (r, d_in). Signs of pairs are arbitrary.

    Raises:
        ValueError: If r exceeds min(d_out, d_in), or W is not finite.
    """
    d_out, d_in = W.shape
    refuse_rank_above(r, (d_out, d_in))
    W = at_least_float32(W.detach())
    if not W.isfinite().all():
        raise ValueError("the weight holds NaN or infinity, and has no singular values")
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :r], S[:r], Vh[:r]
    sample = torch.randn(d_in, r, generator=generator, dtype=torch.float32)
    Q = torch.linalg.qr(W @ sample.to(W)).Q
    for _ in range(niter):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ W, full_matrices=False)
    return Q @ U, S, Vh


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
        # not solve, whose backward pass solves again, and whose forward mode has none of its own
        E: Tensor = 2 * torch.linalg.inv(eye - X) @ X
    return E


def rotate_blocks(x: Tensor, E: Tensor) -> Tensor:
    """Multiply each block of the last axis by a matrix of its own.

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
