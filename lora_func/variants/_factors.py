"""The views of ``W' = W + up down``, for variants that compute one or both of the factors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_func.numerics import DROPOUT, add_low_rank, low_rank_norm
from lora_func.variant import prepared
from lora_func.variants._low_rank import PEFT_FORMATS
from lora_func.variants.lora import from_factors
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
    views = _Views(down, up)
    return {
        "prepare": views.prepare,
        "apply": views.apply,
        "casts": (down,) if isinstance(down, str) else (),
        "weight": views.weight,
        "delta_norm": views.delta_norm,
        "low_rank": views.low_rank,
        "peft": tuple(one._replace(convert=views.as_lora) for one in PEFT_FORMATS),
        "stacks": True,
        "products_only": True,
    }


@dataclass(frozen=True)
class _Views:
    down: str | Callable[[Leaves], Tensor]
    up: Callable[[Leaves], Tensor]

    def prepare(
        self, params: Leaves, shape: tuple[int, int], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        made = {"up": self.up(params).to(dtype)}
        if not isinstance(self.down, str):
            made["down"] = self.down(params).to(dtype)
        return made

    def apply(self, W: Weight, params: Leaves, x: Tensor) -> Tensor:
        if "up" not in params:
            params = prepared(self.prepare, params, W, x.dtype)
        down = params[self.down if isinstance(self.down, str) else "down"]
        return add_low_rank(x, W, down, params["up"], rate=params.get(DROPOUT))

    def low_rank(self, params: Leaves) -> list[tuple[Tensor, Tensor]]:
        B = self.up(params)
        A = params[self.down] if isinstance(self.down, str) else self.down(params)
        return [(A.to(B.dtype), B)]

    def weight(self, W: Weight, params: Leaves) -> Tensor:
        W, ((A, B),) = dense(W), self.low_rank(params)
        return W + (B @ A).to(W.dtype)

    def delta_norm(self, params: Leaves, shape: tuple[int, int] | None) -> Tensor:
        ((A, B),) = self.low_rank(params)
        return low_rank_norm(A, B, B.new_ones(()))

    def as_lora(self, params: Leaves) -> dict[str, Tensor]:
        ((A, B),) = self.low_rank(params)
        kept = {DROPOUT: params[DROPOUT]} if DROPOUT in params else {}
        return {**from_factors(A, B), **kept}
