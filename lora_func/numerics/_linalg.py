"""Norms, singular values and random starts."""

import hashlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from einops import einsum
from torch import Generator, Tensor

from lora_func.compat import autocasts

SINGULAR = {"_U": "d_out r", "_S": "r", "_Vh": "r d_in"}
"""The leaves of a variant that keeps singular triplets of the weight."""


def at_least_float32(t: Tensor) -> Tensor:
    """Return a tensor in float32 or wider, for norms and for solving small matrices."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which matrix products keep the dtype of their operands."""
    return torch.autocast(t.device.type, enabled=False) if autocasts(t) else nullcontext()


def generator_for(name: str) -> Generator:
    """Return a generator on the CPU that is seeded from a name, the same on each machine."""
    digest = hashlib.sha256(name.encode()).digest()
    return Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def kaiming_uniform(rows: int, columns: int, generator: Generator) -> Tensor:
    """Draw from U(-1/√columns, 1/√columns), the same as ``kaiming_uniform_(a=√5)``.

    Returns:
        Shape (rows, columns), float32.
    """
    bound = columns**-0.5
    drawn = torch.empty(rows, columns, dtype=torch.float32, device=generator.device)
    return drawn.uniform_(-bound, bound, generator=generator)


def along_rows(leaf: Tensor) -> Tensor:
    """Shape a leaf (d,), or (K, d) of K adapters, to broadcast over activations (..., d)."""
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


def low_rank_difference(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
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


def check_rank(r: int, shape: Sequence[int]) -> None:
    """Check a rank against the smaller side of a matrix.

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
        generator: Draws the sample of the randomised decomposition.

    Returns:
        U (d_out, r), S (r,) in descending order, Vh (r, d_in). Signs of pairs are arbitrary.

    Raises:
        ValueError: If r exceeds min(d_out, d_in), or W is not finite.
    """
    d_out, d_in = W.shape
    check_rank(r, (d_out, d_in))
    W = at_least_float32(W.detach())
    if not W.isfinite().all():
        raise ValueError("the weight holds NaN or infinity; it has no singular values")
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :r], S[:r], Vh[:r]
    sample = torch.randn(d_in, r, generator=generator, dtype=torch.float32)
    Q = torch.linalg.qr(W @ sample.to(W)).Q
    for _ in range(niter):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ W, full_matrices=False)
    return Q @ U, S, Vh


def two_divisors(d: int, factor: int | None) -> tuple[int, int]:
    """Split a width into two divisors, as LyCORIS does.

    Args:
        d: The width.
        factor: The first divisor, or its upper bound if it does not divide; None for √d.

    Returns:
        (m, n) with m n = d.
    """
    if factor is not None and d % factor == 0:
        return factor, d // factor
    largest = math.isqrt(d) if factor is None else min(factor, math.isqrt(d))
    m = next(m for m in range(largest, 0, -1) if d % m == 0)
    return m, d // m
