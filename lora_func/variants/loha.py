"""LoHa: the elementwise product of two trained low-rank matrices.

    W' = W + s (B1 A1) ⊙ (B2 A2),   s = alpha / r

*Identity at the start because* A2 = 0, so the added term is exactly zero in every dtype.

Asks of W: ``linear`` only.

The product is a low-rank matrix of rank r²: ``(B1 A1) ⊙ (B2 A2) = B A`` with the products of all
pairs of columns of B1 and B2 in B, and of rows of A1 and A2 in A. Neither it nor Δ is built from
d_out x d_in numbers. Its cost grows with r²: a rank above √d / 2 is better merged or made a LoRA.

References:
    FedPara, https://arxiv.org/abs/2108.06098, proposition 1; LyCORIS,
    https://arxiv.org/abs/2309.14859. Code: KohakuBlueleaf/LyCORIS ``modules/loha.py``,
    huggingface/peft ``tuners/loha/layer.py``.

Deviations: FedPara does not start at the base; we follow LyCORIS and PEFT. PEFT rounds the scale to
single precision, also in a double-precision model. Its ``rank_dropout`` and ``module_dropout`` are
read and left out, with the numbers of evaluation. The usual rank is 8, the scale 1, the learning
rate that of LoRA or higher.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from lora_func.configs import ScaledConfig
from lora_func.numerics import kaiming_uniform, scaled
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant, differs_in_padding
from lora_func.variants._factors import views_of
from lora_func.variants._low_rank import alpha_of, scale_like
from lora_func.weights import Weight, dense


@dataclass(frozen=True, kw_only=True)
class LoHa(ScaledConfig):
    """Low-rank Hadamard product; the change has rank r².

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.LoHa(r=2))
        >>> [key.rpartition(".")[2] for key in params]
        ['A1', 'B1', 'A2', 'B2', '_scale']
    """

    usual_scale: ClassVar[float] = 1.0


def init(W: Weight, cfg: LoHa, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw all factors except A2, which is zero.

    Returns:
        A1 and A2 (r, d_in), B1 and B2 (d_out, r), _scale ().
    """
    d_out, d_in = W.shape
    return {
        "A1": kaiming_uniform(cfg.r, d_in, generator),
        "B1": kaiming_uniform(d_out, cfg.r, generator),
        "A2": torch.zeros(cfg.r, d_in),
        "B2": kaiming_uniform(d_out, cfg.r, generator),
        "_scale": torch.tensor(cfg.scale, dtype=torch.float64),
    }


def _down(params: Mapping[str, Tensor]) -> Tensor:
    """The products of all pairs of rows of A1 and A2, shape (r², d_in)."""
    return (params["A1"].unsqueeze(-2) * params["A2"].unsqueeze(-3)).flatten(-3, -2)


def _up(params: Mapping[str, Tensor]) -> Tensor:
    """``s`` times the products of all pairs of columns of B1 and B2, shape (d_out, r²)."""
    B1 = scaled(params["B1"], params["_scale"])
    return (B1.unsqueeze(-1) * params["B2"].unsqueeze(-2)).flatten(-2)


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W + s (B1 A1) ⊙ (B2 A2)``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    first = scaled(params["B1"], params["_scale"]) @ params["A1"]
    return W + (first * (params["B2"] @ params["A2"])).to(W.dtype)


def _peft_settings(leaves: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
    r = leaves["A1"].shape[-2]
    return {"r": r, "alpha": alpha_of(leaves["_scale"], r)}


_PEFT = PeftFormat(
    "LOHA",
    leaves={
        "A1": PeftLeaf("hada_w1_b"),
        "B1": PeftLeaf("hada_w1_a"),
        "A2": PeftLeaf("hada_w2_b"),
        "B2": PeftLeaf("hada_w2_a"),
    },
    settings=_peft_settings,
    constants=lambda config, leaves, W: scale_like(
        config["alpha"] / leaves["A1"].shape[-2], leaves["A1"]
    ),
    patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
    defaults={"r": 8, "alpha": 8},
    ignored=("rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"),
    layers=("Linear", "Conv1d", "Conv2d"),
    refuses=differs_in_padding,
)

VARIANT = Variant(
    name="loha",
    config=LoHa,
    family="low-rank",
    init=init,
    leaves={"A1": "r d_in", "B1": "d_out r", "A2": "r d_in", "B2": "d_out r", "_scale": ""},
    trials={"loha": Trial(lr=3e-3, peft=("LoHaConfig", {"r": 8}))},
    pads=True,
    **{**views_of(_down, _up), "weight": weight, "peft": (_PEFT,)},
)
