"""CorDA: LoRA that starts from directions which the layer's inputs make large or small.

    W' = W + s (B A - B0 A0),   W C = U S Vᵀ,   s B0 A0 = U_r S_r V_rᵀ C⁻¹ = U_r U_rᵀ W

C are the damped second moments of the inputs. The r components with the largest S keep what the
inputs need least (IPM: train what they use), those with the smallest keep knowledge (KPM).

*Identity at the start because* the difference is exactly zero at A0, B0 in every dtype.

Asks of W: ``dense`` at init, ``linear`` after that. Needs calibration data.

References:
    https://arxiv.org/abs/2406.05223, eq. 1-4. Code: iboing/CorDA, huggingface/peft
    ``tuners/lora/corda.py``. The root is that of lora-lite.

Deviations: paper and codes write W - s B0 A0 into the base weight; A0 and B0 are constants here,
and the base stays. The codes divide each batch of inputs by its largest entry, which shifts size
from A to B; here C is divided by the mean of its diagonal, and every token counts alike. The
damping is that of the codes, 0.01 of that mean; they double it where float32 cannot invert C, here
C is inverted in float64. The usual rank is 128 and s = 1; the learning rate is that of LoRA.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from lora_func.checks import check_choice, check_flag
from lora_func.configs import Calibration, LowRankConfig
from lora_func.numerics import (
    Moments,
    at_least_float32,
    check_rank,
    join_moments,
    observe_moments,
    svd,
)
from lora_func.variant import Trial
from lora_func.variants._difference import difference, leaves_at
from lora_func.weights import Weight, dense

_DAMPING = 0.01


@dataclass(frozen=True, kw_only=True)
class CorDA(LowRankConfig):
    """Context-oriented decomposition; make it with ``init(model, CorDA(), data=batches)``.

    Attributes:
        method: "ipm" (instruction-previewed) trains the r components with the largest singular
            values of W C, "kpm" (knowledge-preserved) those with the smallest.
        root: Whether W is multiplied by C^½, and not by C.
    """

    usual_scale: ClassVar[float] = 1.0
    method: Literal["ipm", "kpm"] = "ipm"
    root: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("method", self.method, ("ipm", "kpm"))
        check_flag("root", self.root)

    @property
    def calibration(self) -> Calibration:
        """The inputs of each site."""
        return "inputs"


def init(
    W: Weight, cfg: CorDA, generator: Generator, stats: Moments | None = None
) -> dict[str, Tensor]:
    """Split r components of W evenly between the factors.

    Returns:
        A and _A0 (r, d_in), B and _B0 (d_out, r), _scale (); _dropout () if there is any.

    Raises:
        ValueError: If there was no data, or too little, or r is too large.
    """
    if stats is None:
        raise ValueError("needs calibration data; pass init(..., data=batches)")
    check_rank(cfg.r, W.shape)
    stats.check_enough(1)
    matrix = at_least_float32(dense(W))
    C = _moments(stats)
    if cfg.root:
        C = torch.linalg.cholesky(C)  # the root that is used changes neither U nor S
    U, S, Vh = svd(matrix.double() @ C, min(W.shape))
    chosen = slice(None, cfg.r) if cfg.method == "ipm" else slice(-cfg.r, None)
    rows = torch.linalg.solve(C, Vh[chosen], left=False)
    root = (S[chosen] / cfg.scale).sqrt()
    return leaves_at((root[:, None] * rows).to(matrix), (U[:, chosen] * root).to(matrix), cfg)


def _moments(stats: Moments) -> Tensor:
    """The damped second moments, float64, with a mean of the diagonal of 1 before the damping."""
    C = stats.second_moment(center=False).double()
    mean = C.diagonal().mean()
    if not mean > 0:
        raise ValueError("its inputs are all zero; pass other data")
    return C / mean + _DAMPING * torch.eye(len(C), dtype=C.dtype, device=C.device)


VARIANT = difference(
    name="corda",
    config=CorDA,
    family="SVD",
    init=init,
    observe=observe_moments,
    join=join_moments,
    trials={
        "corda": Trial(lr=3e-4, data=True),
        "corda-kpm": Trial({"method": "kpm", "root": True}, data=True),
    },
)
