"""The views of ``W' = W + up down``, for variants that compute one or both of the factors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_func.numerics import DROPOUT, add_low_rank, low_rank_norm
from lora_func.variant import prepared
from lora_func.variants._low_rank import PEFT_FORMATS
from lora_func.weights import Weight, dense

Leaves = Mapping[str, Tensor]


def views_of(
    down: str | Callable[[Leaves], Tensor], up: Callable[[Leaves], Tensor]
) -> dict[str, Any]:
    """Make the fields of a variant whose change is a product of two factors.

    Args:
        down: The leaf that is the first factor; or a function that makes it, shape (r, d_in).
        up: From the leaves, the second factor, shape (d_out, r).

    Returns:
        Fields of ``Variant``. The variant is written for PEFT as a LoRA.
    """
    leaf = down if isinstance(down, str) else None

    def make_down(params: Leaves) -> Tensor:
        return params[down] if isinstance(down, str) else down(params)

    def prepare(params: Leaves, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        made = {"up": up(params).to(dtype)}
        return made if leaf else {**made, "down": make_down(params).to(dtype)}

    def apply(W: Weight, params: Leaves, x: Tensor) -> Tensor:
        if "up" not in params:
            params = prepared(prepare, params, W, x.dtype)
        return add_low_rank(x, W, params[leaf or "down"], params["up"], rate=params.get(DROPOUT))

    def low_rank(params: Leaves) -> list[tuple[Tensor, Tensor]]:
        B = up(params)
        return [(make_down(params).to(B.dtype), B)]

    def weight(W: Weight, params: Leaves) -> Tensor:
        W, ((A, B),) = dense(W), low_rank(params)
        return W + (B @ A).to(W.dtype)

    def delta_norm(params: Leaves, shape: tuple[int, int] | None) -> Tensor:
        ((A, B),) = low_rank(params)
        return low_rank_norm(A, B, B.new_ones(()))

    def as_lora(params: Leaves) -> dict[str, Tensor]:
        ((A, B),) = low_rank(params)
        kept = {DROPOUT: params[DROPOUT]} if DROPOUT in params else {}
        return {"A": A, "B": B, "_scale": A.new_ones(A.shape[:-2]), **kept}

    return {
        "prepare": prepare,
        "apply": apply,
        "casts": (leaf,) if leaf else (),
        "weight": weight,
        "delta_norm": delta_norm,
        "low_rank": low_rank,
        "peft": tuple(one._replace(convert=as_lora) for one in PEFT_FORMATS),
        "stacks": True,
        "products_only": True,
    }
