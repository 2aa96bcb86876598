"""The views of ``W' = W + s B A``, for variants that differ from LoRA only in their start."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_func.numerics import (
    DROPOUT,
    add_low_rank,
    dropout,
    dropout_leaf,
    dropout_setting,
    low_rank_norm,
    low_rank_term,
    scaled,
)
from lora_func.variant import CONVOLUTIONS, PeftFormat, PeftLeaf, differs_on_convolution, prepared
from lora_func.weights import Affine, Weight, dense

LOW_RANK = {"A": "r d_in", "B": "d_out r", "_scale": "", "_dropout?": ""}
"""The leaves."""


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Compute ``s B`` in the dtype of the activations.

    Returns:
        up.
    """
    return {"up": scaled(params["B"], params["_scale"]).to(dtype)}


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W) + s drop(x) Aᵀ Bᵀ``.

    Returns:
        Shape (..., d_out).
    """
    if "up" not in params:
        params = prepared(prepare, params, W, x.dtype)
    return add_low_rank(x, W, params["A"], params["up"], rate=params.get(DROPOUT))


def add_prepared(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Add a prepared change; with dropout a part of it that x is dropped for.

    Args:
        W: The frozen weight.
        params: down (r, d_in) and up (d_out, r); with dropout also dropped_down and dropped_up.
        x: Activations.

    Returns:
        Shape (..., d_out).
    """
    y = add_low_rank(x, W, params["down"], params["up"])
    if DROPOUT not in params:
        return y
    kept = dropout(x, params[DROPOUT])
    return y + low_rank_term(kept, params["dropped_down"], params["dropped_up"])


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W + s B A``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    return W + (scaled(params["B"], params["_scale"]) @ params["A"]).to(W.dtype)


def delta_norm(params: Mapping[str, Tensor], shape: tuple[int, int] | None) -> Tensor:
    """Compute the norm of ``s B A``.

    Returns:
        Shape ().
    """
    return low_rank_norm(params["A"], params["B"], params["_scale"])


def low_rank(params: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Give the factors, the scale in B.

    Returns:
        One pair, shapes (..., r, d_in) and (..., d_out, r).
    """
    return [(params["A"], scaled(params["B"], params["_scale"]))]


def alpha_of(scale: Tensor, divisor: float) -> float:
    """Return PEFT's alpha: the number that divided by another gives the scale to the last bit.

    Raises:
        ValueError: If the matrices of a stack have different scales.
    """
    scales = [*{*scale.reshape(-1).tolist()}]
    if len(scales) > 1:
        raise ValueError(f"its matrices have the scales {scales}; PEFT has one for all of them")
    alpha = scales[0] * divisor
    near = (alpha, math.nextafter(alpha, -math.inf), math.nextafter(alpha, math.inf))
    return next((a for a in near if a / divisor == scales[0]), alpha)


def scale_like(scale: float, factor: Tensor) -> dict[str, Tensor]:
    """Return the leaf of a scale that a config of PEFT gives, for the matrices of a factor."""
    dtype = torch.promote_types(factor.dtype, torch.float32)
    return {"_scale": torch.full(factor.shape[:-2], scale, dtype=dtype)}


def _peft_settings(leaves: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
    r = leaves["A"].shape[-2]
    settings = {"r": r, "lora_alpha": alpha_of(leaves["_scale"], r)}
    return settings | dropout_setting("lora_dropout", leaves)


def _peft_scale(
    config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Affine
) -> dict[str, Tensor]:
    r = leaves["A"].shape[-2]
    scale = config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r)
    return scale_like(scale, leaves["A"]) | dropout_leaf(config["lora_dropout"])


def _without_dropout(
    config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Affine
) -> dict[str, Tensor]:
    return _peft_scale({**config, "lora_dropout": 0.0}, leaves, W)


def _twice(config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Affine) -> dict[str, Tensor]:
    return {"_scale": 2 * _without_dropout(config, leaves, W)["_scale"]}


def _half_settings(leaves: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
    return _peft_settings({**leaves, "_scale": leaves["_scale"] / 2}, shape)


def is_block_diagonal(config: Mapping[str, Any], path: str, side: str) -> bool:
    """True if PEFT's BD-LoRA has blocks on a side, "a" or "b", of a module."""
    names = config.get(f"use_bdlora.target_modules_bd_{side}") or ()
    return any(name in path.rpartition(".")[2] for name in names)


PEFT_LORA = PeftFormat(
    "LORA",
    leaves={"A": PeftLeaf("lora_A.weight"), "B": PeftLeaf("lora_B.weight")},
    settings=_peft_settings,
    constants=_peft_scale,
    means=lambda config, path: (
        not config.get("use_dora")
        and not config.get("lora_bias")
        and "kasa_config.beta" not in config
        and not any(is_block_diagonal(config, path, side) for side in "ab")
    ),
    patterns={"r": "rank_pattern", "lora_alpha": "alpha_pattern"},
    defaults={"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False},
    inert={
        "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
        "use_qalora": (None, False),
        "use_bdlora": (None, False),
        "alora_invocation_tokens": (None,),
        "layer_replication": (None,),
        "megatron_config": (None,),
        "arrow_config": (None,),
        "kasa_config": (None,),
        "monteclora_config": (None,),
        "velora_config": (None,),
    },
    ignored=(
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_core"),
        *("qalora_group_size", "runtime_config"),
        "trainable_token_indices",  # which peft/_tokens.py reads
    ),
    layers=("Linear", "Conv1D"),
)
PEFT_EMBEDDING = PEFT_LORA._replace(
    leaves={"A": PeftLeaf("lora_embedding_A"), "B": PeftLeaf("lora_embedding_B")},
    constants=_without_dropout,
    layers=("Embedding",),
)
PEFT_CONVOLUTION = PEFT_LORA._replace(
    leaves={
        "A": PeftLeaf("lora_A.weight", layout="kernel"),
        "B": PeftLeaf("lora_B.weight", layout="ones"),
    },
    layers=CONVOLUTIONS,
    refuses=differs_on_convolution,
)
PEFT_PARAMETER = PEFT_LORA._replace(
    leaves={
        "A": PeftLeaf("lora_A.weight", layout="major"),
        "B": PeftLeaf("lora_B.weight", layout="minor"),
    },
    constants=_without_dropout,
    layers=("Parameter",),
)
PEFT_IN_PROJ = PEFT_LORA._replace(constants=_without_dropout, layers=("in_proj",))
PEFT_OUT_PROJ = PEFT_LORA._replace(constants=_twice, settings=_half_settings, layers=("out_proj",))
"""PEFT, to 0.21, adds the change of the output projection of torch's attention twice."""

PEFT_FORMATS = (
    *(PEFT_LORA, PEFT_EMBEDDING, PEFT_CONVOLUTION, PEFT_PARAMETER, PEFT_IN_PROJ, PEFT_OUT_PROJ),
)
"""LoRA as PEFT stores it, on each kind of layer."""

PEFT_EXPORTS = tuple(one._replace(convert=dict) for one in PEFT_FORMATS)
"""The same for variants that are written as a LoRA; a LoRA is what is read."""
