"""LoRA: a trained low-rank term beside the frozen weight.

    W' = W + s B A,   s = alpha / r   (rsLoRA: alpha / √r)

*Identity at the start because* B = 0, so the added term is exactly zero in every dtype.

Asks of W: ``linear`` only.

References:
    LoRA, https://arxiv.org/abs/2106.09685, eq. 3; rsLoRA, https://arxiv.org/abs/2312.03732. Code:
    microsoft/LoRA ``loralib/layers.py``, huggingface/peft ``tuners/lora/layer.py``.

Deviations: the paper draws A from a Gaussian, both codes from ``kaiming_uniform_(a=√5)``; we follow
the codes. An r above min(d_out, d_in) adds parameters and no rank, here as in PEFT.
PEFT adds the term in the adapter's dtype, we in that of the activations. PEFT's default alpha of 8
makes s shrink as r grows; here s stays 2.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.checks import check_flag
from lora_func.configs import LowRankConfig
from lora_func.numerics import dropout_leaf, kaiming_uniform
from lora_func.variant import Trial, Variant
from lora_func.variants._low_rank import (
    LOW_RANK,
    PEFT_FORMATS,
    apply,
    delta_norm,
    low_rank,
    prepare,
    weight,
)
from lora_func.weights import Weight


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRankConfig):
    """Low-rank adaptation, ``W + s B A``.

    Attributes:
        rslora: Scale by ``alpha / √r`` instead of ``alpha / r``; with alpha None, s stays 2.
        bias: Whether the bias of the layer is trained too, as ``lora_bias`` says.

    Example:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.LoRA(r=2))
        >>> {key: tuple(leaf.shape) for key, leaf in params.items()}
        {'0.lora.A': (2, 4), '0.lora.B': (3, 2), '0.lora._scale': ()}
    """

    rslora: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("rslora", self.rslora)
        check_flag("bias", self.bias)

    @property
    def variant(self) -> str:
        """The name that belongs to the setting of the bias."""
        return "lora_bias" if self.bias else "lora"

    @property
    def scale(self) -> float:
        """The factor ``s``."""
        if self.rslora and self.alpha is not None:
            return self.alpha / math.sqrt(self.r)
        return super().scale


def init(W: Weight, cfg: LoRA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw A, leave B at zero.

    Returns:
        A (r, d_in), B (d_out, r), _scale (); _dropout () if there is any.
    """
    d_out, d_in = W.shape
    return {
        "A": kaiming_uniform(cfg.r, d_in, generator),
        "B": torch.zeros(d_out, cfg.r),
        "_scale": torch.tensor(cfg.scale, dtype=torch.float64),
        **dropout_leaf(cfg.dropout),
    }


def from_factors(A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Make the leaves whose change of the weight is ``B A``.

    Returns:
        A (..., r, d_in), B (..., d_out, r), _scale (...), which is 1.
    """
    return {"A": A, "B": B.to(A.dtype), "_scale": A.new_ones(A.shape[:-2])}


VARIANT = Variant(
    name="lora",
    config=LoRA,
    family="low-rank",
    init=init,
    apply=apply,
    prepare=prepare,
    casts=("A",),
    weight=weight,
    delta_norm=delta_norm,
    leaves=LOW_RANK,
    low_rank=low_rank,
    peft=PEFT_FORMATS,
    trials={
        "lora": Trial(peft=("LoraConfig", {"r": 8})),
        "rslora": Trial({"alpha": 8.0, "rslora": True}),
    },
    pads=True,
    stacks=True,
    products_only=True,
)
