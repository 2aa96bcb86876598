"""LoRA with a trained bias: ``LoRA(bias=True)``.

    W' = W + s B A,   b' = b + s c,   s = alpha / r

*Identity at the start because* B = 0 and c = 0, so both terms are exactly zero in every dtype.

Asks of W: ``linear`` only. A layer without a bias gets one: ``merge`` writes it, ``attach`` has no
place for it.

References:
    As for LoRA; the bias is huggingface/peft ``lora_bias`` in ``tuners/lora/layer.py``.

Deviations: none from PEFT, which multiplies the bias by the scale too. The paper has no bias.
"""

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from lora_func.numerics import along_rows, scaled
from lora_func.variant import PeftLeaf, Trial, Variant
from lora_func.variants import lora
from lora_func.variants._low_rank import LOW_RANK, PEFT_LORA, delta_norm, prepare, weight
from lora_func.variants._low_rank import apply as apply_low_rank
from lora_func.weights import Weight


def init(W: Weight, cfg: lora.LoRA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw A, leave B and c at zero.

    Returns:
        The leaves of a LoRA, and c (d_out,).
    """
    return {**lora.init(W, cfg, generator), "c": torch.zeros(W.shape[0])}


def _added(params: Mapping[str, Tensor]) -> Tensor:
    return scaled(params["c"].unsqueeze(-1), params["_scale"]).squeeze(-1)


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W) + s drop(x) Aᵀ Bᵀ + s c``.

    Returns:
        Shape (..., d_out).
    """
    y = apply_low_rank(W, params, x)
    return y + along_rows(_added(params)).to(y.dtype)


def bias(b: Tensor | None, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``b + s c``.

    Returns:
        Shape (d_out,).
    """
    added = _added(params)
    return added if b is None else b + added.to(b.dtype)


VARIANT = Variant(
    name="lora_bias",
    config=lora.LoRA,
    family="low-rank",
    init=init,
    apply=apply,
    prepare=prepare,
    casts=("A",),
    weight=weight,
    bias=bias,
    delta_norm=delta_norm,
    leaves={**LOW_RANK, "c": "d_out"},
    peft=(
        PEFT_LORA._replace(
            leaves={**PEFT_LORA.leaves, "c": PeftLeaf("lora_B.bias")},
            settings=lambda leaves, shape: {
                **PEFT_LORA.settings(leaves, shape),
                "lora_bias": True,
            },
            means=lambda config, path: bool(config.get("lora_bias")),
            defaults={**PEFT_LORA.defaults, "lora_bias": False},
            layers=("Linear",),
        ),
    ),
    trials={"lora-bias": Trial({"bias": True}, peft=("LoraConfig", {"r": 8, "lora_bias": True}))},
    pads=True,
    stacks=True,
)
