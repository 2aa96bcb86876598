"""Singular directions of a weight, plain or as the inputs of the layer weigh them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_func.checks import check_choice
from lora_func.configs import Calibration, RankConfig
from lora_func.numerics import Moments, at_least_float32, check_rank, svd
from lora_func.weights import Weight, dense

_DAMPING = 1e-3
"""What is added to the second moments of the inputs, relative to their mean."""


@dataclass(frozen=True, kw_only=True)
class BasisConfig(RankConfig):
    """A config whose adapters act along r singular directions of the weight.

    Attributes:
        basis: "svd", the singular vectors of W; "corda", those of W C^½ with C the second moments
            of the inputs; "asvd", the same with the diagonal of C. The last two need
            ``init(..., data=batches)``.
        pool: With data, a plain basis keeps the directions with the largest S times the size of the
            activation along them: its "rms" or "std". Without data, those with the largest S.
    """

    r: int = 64
    basis: str = "svd"
    pool: str = "rms"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("basis", self.basis, ("svd", "corda", "asvd"))
        check_choice("pool", self.pool, ("rms", "std"))

    @property
    def calibration(self) -> Calibration:
        """The inputs of each site."""
        return "inputs"


def directions(
    W: Weight, cfg: BasisConfig, stats: Moments | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Find r directions, in the order of S.

    Args:
        W: The weight.
        cfg: The config.
        stats: The moments of the inputs, if there is data.

    Returns:
        U (d_out, r), S (r,), and Vh (r, d_in) of a plain basis; None of another one.

    Raises:
        ValueError: If r is too large, or the basis needs data and has none, or too little.
    """
    if cfg.basis == "svd":
        return singular_triplets(W, cfg.r, cfg.pool, stats)
    check_rank(cfg.r, W.shape)
    if stats is None:
        raise ValueError(
            f"basis={cfg.basis!r} needs calibration data; pass init(..., data=batches)"
        )
    stats.check_enough(cfg.r)
    matrix = at_least_float32(dense(W))
    U, S, _ = svd(matrix.double() @ _root(stats, cfg.basis == "asvd"), cfg.r)
    return U.to(matrix), S.to(matrix), None


def singular_triplets(
    W: Weight, r: int, pool: str, stats: Moments | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose r singular triplets: with data those with the largest S times activation.

    Args:
        W: The weight.
        r: How many.
        pool: The size of an activation, "rms" or "std".
        stats: The moments of the inputs, if there is data.

    Returns:
        U (d_out, r), S (r,) and Vh (r, d_in), in the order of S.

    Raises:
        ValueError: If r is too large, or there is too little data.
    """
    check_rank(r, W.shape)
    U, S, Vh = svd(dense(W), min(W.shape))
    chosen = torch.arange(r, device=S.device)
    if stats is not None:
        stats.check_enough(r)
        score = S * stats.along(Vh, center=pool == "std")
        chosen = score.topk(r).indices.sort().values
    return U[:, chosen], S[chosen], Vh[chosen]


def _root(stats: Moments, diagonal: bool) -> Any:
    """A square root of the damped second moments; any root gives the same U and S."""
    C = stats.second_moment(center=False).double() / max(stats.tokens, 1)
    mean = C.diagonal().mean()
    if not mean > 0:
        raise ValueError("its inputs are all zero; pass other data")
    C = C + _DAMPING * mean * torch.eye(len(C), dtype=C.dtype, device=C.device)
    return C.diagonal().sqrt().diag() if diagonal else torch.linalg.cholesky(C)
