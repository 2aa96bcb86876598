"""Running mean and scatter of a site's inputs, which several variants are calibrated on."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_func.numerics._linalg import at_least_float32


class Moments(NamedTuple):
    """Mean and scatter of the rows seen so far, in float32 or better.

    Attributes:
        tokens: The number of rows.
        mean: Shape (d,).
        scatter: Sum of the outer products of the centred rows, shape (d, d).
    """

    tokens: int
    mean: Tensor
    scatter: Tensor

    def second_moment(self, center: bool) -> Tensor:
        """Return the sum of outer products of the rows, centred or not, shape (d, d)."""
        if center:
            return self.scatter
        return self.scatter + self.tokens * torch.outer(self.mean, self.mean)

    def along(self, rows: Tensor, center: bool) -> Tensor:
        """Return the root of the summed squares along directions (k, d), shape (k,)."""
        moment = self.second_moment(center).to(rows)
        return ((rows @ moment) * rows).sum(-1).clamp_min(0).sqrt()

    def check_enough(self, least: int) -> None:
        """Check that there are enough rows, and that they are finite.

        Raises:
            ValueError: If there are fewer than ``least``, or they are not finite.
        """
        if self.tokens < least:
            raise ValueError(
                f"saw {self.tokens} tokens of data, needs at least {least}; pass more batches to "
                "init(..., data=...)"
            )
        if not self.scatter.isfinite().all():
            raise ValueError("its inputs hold NaN or infinity, or are too large for their dtype")


class Components(NamedTuple):
    """Principal components of a site's inputs.

    Attributes:
        rows: Orthonormal, by descending variance, shape (k, d_in).
        explained: The share of the variance that each component explains, shape (k,).
    """

    rows: Tensor
    explained: Tensor


def principal_components(moments: Moments, center: bool) -> Components:
    """Find all principal components; the largest entry of each is positive, as in PEFT.

    Args:
        moments: Of the inputs.
        center: True to subtract their mean.

    Returns:
        d components.
    """
    # a scatter matrix squares the condition number: float32 would keep only an outlier
    values, vectors = torch.linalg.eigh(moments.second_moment(center).double())
    values, rows = values.flip(0).clamp_min(0), vectors.mT.flip(0)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    total = values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return Components(rows * largest.sign(), values / total)


def join_moments(first: Moments, second: Moments) -> Moments:
    """Join the moments of two sets of rows, by the pairwise update of Chan et al."""
    tokens = first.tokens + second.tokens
    if not tokens:
        return first
    apart, share = second.mean - first.mean, second.tokens / tokens
    scatter = first.scatter + second.scatter
    scatter = scatter.addr(apart, apart, alpha=first.tokens * share)
    return Moments(tokens, first.mean + apart * share, scatter)


def observe_moments(cfg: Any, acc: Moments | None, x: Tensor, gy: object) -> Moments:
    """Add rows to the moments, by the pairwise update of Chan et al., which does not cancel.

    Args:
        cfg: Not used.
        acc: The moments so far, or None.
        x: Shape (n, d).
        gy: Not used.

    Returns:
        New moments; the old ones do not change.
    """
    x = at_least_float32(x)
    n = x.shape[0]
    if acc is None:
        acc = Moments(0, x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1]))
    if n == 0:
        return acc
    tokens, mean = acc.tokens + n, x.mean(0)
    apart, centred = mean - acc.mean, x - mean
    scatter = torch.addmm(acc.scatter, centred.mT, centred)
    scatter.addr_(apart, apart, alpha=acc.tokens * n / tokens)
    return Moments(tokens, acc.mean + apart * (n / tokens), scatter)
