"""Mathematics that several variants share."""

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Generator, Tensor


def kaiming_uniform(rows: int, columns: int, generator: Generator) -> Tensor:
    """Draw from U(-1/√columns, 1/√columns), the same as ``kaiming_uniform_(a=√5)``.

    Returns:
        Shape (rows, columns), float32.
    """
    bound = columns**-0.5
    drawn = torch.empty(rows, columns, dtype=torch.float32, device=generator.device)
    return drawn.uniform_(-bound, bound, generator=generator)


def low_rank(x: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """Compute ``x Aᵀ (s B)ᵀ`` in the dtype of x, never through the matrix B A.

    The scale goes into B in the leaves' dtype: on the activations it could overflow in float16.

    Args:
        x: Shape (..., d_in).
        A: Shape (r, d_in).
        B: Shape (d_out, r).
        scale: ``s``, 0-d.

    Returns:
        Shape (..., d_out).
    """
    return F.linear(F.linear(x, A.to(x.dtype)), (B * scale.to(B.dtype)).to(x.dtype))


def low_rank_norm(A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """Compute the Frobenius norm of ``s B A`` from two r x r matrices; leading axes are batch axes.

    Returns:
        The norms, float64, with the leading axes of A.
    """
    A, B = A.double(), B.double()
    of_rows = einsum(A, A, "... i d_in, ... j d_in -> ... i j")
    of_columns = einsum(B, B, "... d_out i, ... d_out j -> ... i j")
    return scale.abs() * (of_rows * of_columns).sum((-2, -1)).clamp_min(0).sqrt()
