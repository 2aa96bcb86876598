"""The views of ``W' = W + s (B A - B0 A0)``: a LoRA that starts elsewhere, the base as it is.

A0 and B0 are constants, the values at which A and B start. The difference is taken as
``(B - B0) A + B0 (A - A0)``, which is exactly zero there in every dtype.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_func.configs import LowRankConfig
from lora_func.numerics import (
    DROPOUT,
    dropout_leaf,
    low_rank_difference,
    low_rank_norm,
    scaled,
)
from lora_func.variant import PeftFormat, Variant, prepared
from lora_func.variants._low_rank import LOW_RANK, PEFT_FORMATS, PEFT_LORA, add_prepared
from lora_func.weights import Affine, Weight, dense


def leaves_at(A: Tensor, B: Tensor, cfg: LowRankConfig) -> dict[str, Tensor]:
    """Make the leaves of a site from its start.

    Args:
        A: Shape (r, d_in).
        B: Shape (d_out, r).
        cfg: The config, with the scale and the dropout.

    Returns:
        A and _A0 (r, d_in), B and _B0 (d_out, r), _scale (); _dropout () if there is any.
    """
    A, B = A.contiguous(), B.contiguous()
    scale = torch.tensor(cfg.scale, dtype=torch.float64)
    copies = {"_A0": A.clone(), "_B0": B.clone()}
    return {"A": A, "B": B, **copies, "_scale": scale, **dropout_leaf(cfg.dropout)}


def _factors(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return low_rank_difference(params["A"], params["B"], params["_A0"], params["_B0"])


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Make the factors of the difference; with dropout those of the start and of the trained term.

    Returns:
        down and up; with dropout also dropped_down and dropped_up.
    """
    scale = params["_scale"]
    if DROPOUT not in params:
        down, up = _factors(params)
        return {"down": down.to(dtype), "up": scaled(up, scale).to(dtype)}
    return {
        "down": params["_A0"].to(dtype),
        "up": scaled(-params["_B0"], scale).to(dtype),
        "dropped_down": params["A"].to(dtype),
        "dropped_up": scaled(params["B"], scale).to(dtype),
    }


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W) + s x (B A - B0 A0)ᵀ``, as a LoRA of rank 2r.

    With dropout it is ``linear(x, W) - s x (B0 A0)ᵀ + s drop(x) (B A)ᵀ``.

    Returns:
        Shape (..., d_out).
    """
    if "up" not in params:
        params = prepared(prepare, params, W, x.dtype)
    return add_prepared(W, params, x)


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W + s (B A - B0 A0)``.

    Returns:
        Shape (d_out, d_in).
    """
    W, (down, up) = dense(W), _factors(params)
    return W + (scaled(up, params["_scale"]) @ down).to(W.dtype)


def delta_norm(params: Mapping[str, Tensor], shape: tuple[int, int] | None) -> Tensor:
    """Compute the norm of ``s (B A - B0 A0)``.

    Returns:
        Shape ().
    """
    return low_rank_norm(*_factors(params), params["_scale"])


def low_rank(params: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Give the factors of the trained and of the initial product, the scale in B.

    Returns:
        Two pairs, shapes (..., r, d_in) and (..., d_out, r).
    """
    B, B0 = (scaled(params[leaf], params["_scale"]) for leaf in ("B", "_B0"))
    return [(params["A"], B), (params["_A0"], -B0)]


def _as_lora(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same change as a LoRA of rank 2r, for PEFT."""
    A = torch.cat([leaves["A"], leaves["_A0"]])
    B = torch.cat([leaves["B"], -leaves["_B0"]], 1)
    kept = {leaf: leaves[leaf] for leaf in ("_scale", DROPOUT) if leaf in leaves}
    return {"A": A, "B": B, **kept}


Start = Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]]


def peft_start(name: str, start: Start) -> PeftFormat:
    """Return the format of PEFT's checkpoints of a start that it takes from the base.

    PEFT subtracts such a start from the base each time that it loads a checkpoint.

    Args:
        name: PEFT's ``init_lora_weights``.
        start: From the weight, the rank and the scale, A and B.

    Returns:
        A format that is read alone.
    """

    def constants(
        config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Affine
    ) -> dict[str, Tensor]:
        found = PEFT_LORA.constants(config, leaves, W)
        A, r = leaves["A"], leaves["A"].shape[-2]
        A0, B0 = start(dense(W).to(A.dtype), r, found["_scale"])
        return {"_A0": A0.contiguous(), "_B0": B0.contiguous(), **found}

    return PEFT_LORA._replace(
        constants=constants,
        holds=lambda leaves: False,
        inert={**PEFT_LORA.inert, "init_lora_weights": (name,)},
    )


def difference(*read: PeftFormat, **fields: Any) -> Variant:
    """Return a variant with these views.

    Args:
        *read: The formats in which PEFT's checkpoints of it are read. It is written as a LoRA of
            rank 2r.
        **fields: Its other fields.

    Returns:
        The variant.
    """
    written = (one._replace(convert=_as_lora) for one in PEFT_FORMATS)
    return Variant(
        **fields,
        apply=apply,
        prepare=prepare,
        weight=weight,
        delta_norm=delta_norm,
        leaves={**LOW_RANK, "_A0": "r d_in", "_B0": "d_out r"},
        low_rank=low_rank,
        peft=(*written, *read),
        pads=True,
        stacks=True,
        products_only=True,
    )
