"""LoRA: a trained low-rank term beside the frozen weight.

    W' = W + s B A,   s = alpha / r   (rsLoRA: alpha / √r)

*Identity at the start because* B = 0, so the added term is exactly zero in every dtype. The start
"orthogonal" has ``B A = 0`` up to rounding, with two factors that are not zero.

Asks of W: ``linear`` only.

References:
    LoRA, https://arxiv.org/abs/2106.09685, eq. 3; rsLoRA, https://arxiv.org/abs/2312.03732. Code:
    microsoft/LoRA ``loralib/layers.py``, huggingface/peft ``tuners/lora/layer.py``.

Deviations: the paper draws A from a Gaussian, both codes from ``kaiming_uniform_(a=√5)``; we follow
the codes, and ``start="gaussian"`` gives PEFT's Gaussian, of standard deviation 1 / r. An r above
min(d_out, d_in) adds parameters and no rank, here as in PEFT. PEFT adds the term in the adapter's
dtype, we in that of the activations. PEFT's default alpha of 8 makes s shrink as r grows; here s
stays 2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from lora_func.checks import check_choice, check_flag
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
        start: How A is drawn: "kaiming" is uniform, "gaussian" normal; B is zero. "orthogonal"
            draws both, from orthogonal parts of the r dimensions between them; r must be even
            (https://datta0.github.io/posts/rethink-lora-init/, huggingface/peft
            ``orthogonal_init``).

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.LoRA(r=2))
        >>> {key: tuple(leaf.shape) for key, leaf in params.items()}
        {'0.lora.A': (2, 4), '0.lora.B': (3, 2), '0.lora._scale': ()}
    """

    rslora: bool = False
    bias: bool = False
    start: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("start", self.start, ("kaiming", "gaussian", "orthogonal"))
        odd = [r for r in self.ranks if r % 2]
        if self.start == "orthogonal" and odd:
            raise ValueError(f"r: got {odd[0]}; the start 'orthogonal' needs an even r")
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
    """Draw the factors.

    Returns:
        A (r, d_in), B (d_out, r), _scale (); _dropout () if there is any.
    """
    scale = torch.tensor(cfg.scale, dtype=torch.float64)
    return {**_factors(W.shape, cfg, generator), "_scale": scale, **dropout_leaf(cfg.dropout)}


def _factors(shape: Sequence[int], cfg: LoRA, generator: Generator) -> dict[str, Tensor]:
    (d_out, d_in), r = shape, cfg.r

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float32)

    if cfg.start == "orthogonal":
        Q = torch.linalg.qr(normal(r, r).double()).Q
        A = Q[::2].mT @ normal(r // 2, d_in).double()
        B = normal(d_out, r // 2).double() @ Q[1::2]
        return {"A": A / 10, "B": B / 10}
    kaiming = cfg.start == "kaiming"
    A = kaiming_uniform(r, d_in, generator) if kaiming else normal(r, d_in) / r
    return {"A": A, "B": torch.zeros(d_out, r)}


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
        "lora-gaussian": Trial({"start": "gaussian"}),
        "lora-orthogonal": Trial({"start": "orthogonal"}, start="close"),
    },
    pads=True,
    stacks=True,
    products_only=True,
)
