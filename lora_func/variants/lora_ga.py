"""LoRA-GA: LoRA that starts along the gradient of the loss.

    W' = W + s (B A - B0 A0),   G = U S Vᵀ,   A0 = c V[:, a]ᵀ,   B0 = c U[:, b]

G is the gradient in W over calibration data; a and b are two disjoint sets of r of its 2r largest
directions. The first step then comes as close to a step on W as a LoRA can.

*Identity at the start because* the difference is exactly zero at A0, B0 in every dtype.

Asks of W: ``dense`` at init for ``scale="weight_svd"``, else ``linear`` only. Needs calibration
data and a loss.

References:
    https://arxiv.org/abs/2407.05000, theorem 3.1 and eq. 12. Code: Outsider565/LoRA-GA,
    huggingface/peft ``tuners/lora/layer.py`` (``lora_ga_init``).

Deviations: paper and codes write W - s B0 A0 into the base weight; A0 and B0 are constants here,
and the base stays. PEFT multiplies B0 by the singular values of G, scales B0 alone, and draws the
same directions for A0 and B0 at "random"; we follow the authors, ``peft_compat=True`` gives PEFT's.
The codes take a randomised SVD; ``niter`` chooses one. The usual rank is 8 and s = 2; the learning
rate is half of LoRA's.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from lora_func.checks import check_choice, check_count, check_flag, check_number
from lora_func.configs import Calibration, LowRankConfig
from lora_func.numerics import WeightGradient, join_gradients, observe_gradient, svd
from lora_func.variant import Trial
from lora_func.variants._difference import difference, leaves_at
from lora_func.weights import Weight, dense


@dataclass(frozen=True, kw_only=True)
class LoRAGA(LowRankConfig):
    """Gradient approximation; make it with ``init(model, LoRAGA(), data=batches)``.

    Attributes:
        direction: The directions of A0 and of B0: "ArB2r" gives A0 the r largest and B0 the r next,
            "A2rBr" the reverse, "ArBr" takes them in turns, "random" draws them.
        scale_by: The factor c: "stable" is d_out^¼ / √stable_gamma, "weight_svd" the size of the
            singular values of W, "gd_scale" 1 / s, "unit" 1.
        stable_gamma: γ of "stable".
        niter: None for the exact singular value decomposition; an integer for the randomised one
            with that many power iterations.
        peft_compat: Whether the start is PEFT's, in which B0 has the size of the gradient.
    """

    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale_by: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: float = 16.0
    niter: int | None = None
    peft_compat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("direction", self.direction, ("ArB2r", "A2rBr", "ArBr", "random"))
        check_choice("scale_by", self.scale_by, ("stable", "weight_svd", "gd_scale", "unit"))
        check_number("stable_gamma", self.stable_gamma, above=0)
        check_flag("peft_compat", self.peft_compat)
        if self.niter is not None:
            check_count("niter", self.niter, least=0)

    @property
    def calibration(self) -> Calibration:
        """The inputs of each site, and the gradients of its outputs."""
        return "gradients"


def init(
    W: Weight, cfg: LoRAGA, generator: Generator, stats: WeightGradient | None = None
) -> dict[str, Tensor]:
    """Take 2r singular directions of the gradient, r for each factor.

    Returns:
        A and _A0 (r, d_in), B and _B0 (d_out, r), _scale (); _dropout () if there is any.

    Raises:
        ValueError: If there was no data, the gradient is zero, or 2r exceeds a width.
    """
    if stats is None:
        raise ValueError("needs calibration data; pass init(..., data=batches)")
    if 2 * cfg.r > min(W.shape):
        raise ValueError(f"r = {cfg.r} needs 2r directions, the weight has {min(W.shape)}; lower r")
    stats.check()
    U, S, Vh = svd(stats.total / stats.batches, 2 * cfg.r, cfg.niter, generator)
    of_A, of_B = _directions(cfg, generator)
    A, B = Vh[of_A], U[:, of_B]
    if cfg.peft_compat:
        B = B * S[of_B]
    of_both = (1.0, 1.0) if cfg.scale_by == "unit" else _factors(W, cfg, S[of_B])
    return leaves_at(A * of_both[0], B * of_both[1], cfg)


def _directions(cfg: LoRAGA, generator: Generator) -> tuple[Tensor, Tensor]:
    """The places of the directions of A0 and of B0 among the 2r."""
    places = torch.arange(2 * cfg.r)
    first, second = places[: cfg.r], places[cfg.r :]
    if cfg.direction == "ArB2r":
        return first, second
    if cfg.direction == "A2rBr":
        return second, first
    if cfg.direction == "ArBr":
        return places[1::2], places[::2]
    drawn = torch.randperm(2 * cfg.r, generator=generator)
    return drawn[: cfg.r], drawn[: cfg.r] if cfg.peft_compat else drawn[cfg.r :]


def _factors(W: Weight, cfg: LoRAGA, S: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """What A0 and B0 are multiplied by."""
    if cfg.scale_by == "gd_scale":
        return 1 / cfg.scale, 1 / cfg.scale
    c: Tensor | float
    if cfg.scale_by == "stable":
        c = W.shape[0] ** 0.25 / cfg.stable_gamma**0.5
    else:
        of_W = svd(dense(W), cfg.r)[1].to(S)
        of_G = S[0] if S[0] > 0 else of_W[0]
        c = of_W[0] / of_G if cfg.peft_compat else (of_W / cfg.scale).sqrt().mean()
    return (1.0, c) if cfg.peft_compat else (c, c)


VARIANT = difference(
    name="lora_ga",
    config=LoRAGA,
    family="low-rank",
    init=init,
    observe=observe_gradient,
    join=join_gradients,
    trials={"lora-ga": Trial(lr=3e-4, data=True)},
)
