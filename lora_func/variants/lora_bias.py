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
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant, prepared
from lora_func.variants import _low_rank as low_rank
from lora_func.variants import lora
from lora_func.weights import Weight


def init(W: Weight, cfg: lora.LoRA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw A, leave B and c at zero.

    Returns:
        The leaves of a LoRA, and c (d_out,).
    """
    return {**lora.init(W, cfg, generator), "c": torch.zeros(W.shape[0])}


def _added(params: Mapping[str, Tensor]) -> Tensor:
    return scaled(params["c"].unsqueeze(-1), params["_scale"]).squeeze(-1)


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Compute ``s B`` and ``s c`` in the dtype of the activations.

    Returns:
        up and added.
    """
    return {**low_rank.prepare(params, shape, dtype), "added": _added(params).to(dtype)}


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W) + s drop(x) Aᵀ Bᵀ + s c``.

    Returns:
        Shape (..., d_out).
    """
    if "added" not in params:
        params = prepared(prepare, params, W, x.dtype)
    y = low_rank.apply(W, params, x)
    return y + along_rows(params["added"]).to(y.dtype)


def bias(b: Tensor | None, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``b + s c``.

    Returns:
        Shape (d_out,).
    """
    added = _added(params)
    return added if b is None else b + added.to(b.dtype)


def _format(of_lora: PeftFormat) -> PeftFormat:
    return of_lora._replace(
        leaves={**of_lora.leaves, "c": PeftLeaf("lora_B.bias")},
        settings=lambda leaves, shape: {**of_lora.settings(leaves, shape), "lora_bias": True},
        means=lambda config, path: bool(config.get("lora_bias")),
        defaults={**of_lora.defaults, "lora_bias": False},
    )


VARIANT = Variant(
    name="lora_bias",
    config=lora.LoRA,
    family="low-rank",
    init=init,
    apply=apply,
    prepare=prepare,
    casts=("A",),
    weight=low_rank.weight,
    bias=bias,
    delta_norm=low_rank.delta_norm,
    leaves={**low_rank.LOW_RANK, "c": "d_out"},
    peft=(
        _format(low_rank.PEFT_LORA._replace(layers=("Linear",))),
        _format(low_rank.PEFT_CONVOLUTION),
    ),
    trials={"lora-bias": Trial({"bias": True}, peft=("LoraConfig", {"r": 8, "lora_bias": True}))},
    pads=True,
    stacks=True,
)
