"""LoRA-One: LoRA that starts one step along the gradient of the loss.

    W' = W + s B A,   -G = U S Vᵀ,   A0 = √(S_r / (γ S_1)) V_rᵀ,   B0 = U_r √(S_r / (γ S_1))

``B0 A0`` are the r largest components of -G, with a spectral norm of 1 / γ.

*No identity at the start*: the method begins with that step. With ``step=False`` the change is
``s (B A - B0 A0)``, which keeps the directions alone, and is exactly zero at the start.

Asks of W: ``linear`` only. Needs calibration data and a loss.

References:
    https://arxiv.org/abs/2502.01235, alg. 1. Code: YuanheZ/LoRA-One.

Deviations: none in the start. The paper also preconditions the gradients, which
``lora_func.rules.riemannian`` does. As in the code, ``s = alpha / √r``. The usual rank is 8, alpha
16, γ 128; the learning rate is that of LoRA.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lora_func.checks import check_flag, check_number
from lora_func.configs import Calibration, LowRankConfig
from lora_func.numerics import WeightGradient, dropout_leaf, join_gradients, observe_gradient, svd
from lora_func.variant import Trial, Variant
from lora_func.variants import _low_rank as low_rank
from lora_func.variants._difference import difference, leaves_at
from lora_func.weights import Weight


@dataclass(frozen=True, kw_only=True)
class LoRAOne(LowRankConfig):
    """One full gradient step; make it with ``init(model, LoRAOne(), data=batches)``.

    Attributes:
        gamma: The spectral norm of ``B0 A0`` is 1 / gamma.
        step: Whether the adapter starts with that step; else the step is taken away again.
    """

    usual_scale: ClassVar[float] = 16 / math.sqrt(8)
    gamma: float = 128.0
    step: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, above=0)
        check_flag("step", self.step)

    @property
    def variant(self) -> str:
        """The name that belongs to the setting."""
        return "lora_one" if self.step else "lora_one_start"

    @property
    def scale(self) -> float:
        """The factor ``s``."""
        return super().scale if self.alpha is None else self.alpha / math.sqrt(self.r)

    @property
    def calibration(self) -> Calibration:
        """The inputs of each site, and the gradients of its outputs."""
        return "gradients"


def init(
    W: Weight, cfg: LoRAOne, generator: Generator, stats: WeightGradient | None = None
) -> dict[str, Tensor]:
    """Split the r largest components of the negative gradient evenly between the factors.

    Returns:
        A (r, d_in), B (d_out, r), _scale (); without the step copies _A0 and _B0; _dropout () if
        there is any.

    Raises:
        ValueError: If there was no data, the gradient is zero, or r is too large.
    """
    if stats is None:
        raise ValueError("needs calibration data; pass init(..., data=batches)")
    stats.check()
    U, S, Vh = svd(-stats.total, cfg.r)
    root = (S / (S[0] * cfg.gamma)).sqrt()
    A, B = root[:, None] * Vh, U * root
    if not cfg.step:
        return leaves_at(A, B, cfg)
    scale = torch.tensor(cfg.scale, dtype=torch.float64)
    return {"A": A, "B": B, "_scale": scale, **dropout_leaf(cfg.dropout)}


VARIANTS = (
    Variant(
        name="lora_one",
        config=LoRAOne,
        family="low-rank",
        init=init,
        apply=low_rank.apply,
        prepare=low_rank.prepare,
        casts=("A",),
        weight=low_rank.weight,
        observe=observe_gradient,
        join=join_gradients,
        delta_norm=low_rank.delta_norm,
        leaves=low_rank.LOW_RANK,
        low_rank=low_rank.low_rank,
        peft=low_rank.PEFT_EXPORTS,
        trials={"lora-one": Trial(data=True, start="elsewhere")},
        pads=True,
        stacks=True,
        products_only=True,
    ),
    difference(
        name="lora_one_start",
        config=LoRAOne,
        family="low-rank",
        init=init,
        observe=observe_gradient,
        join=join_gradients,
        trials={"lora-one-start": Trial({"step": False}, data=True)},
    ),
)
