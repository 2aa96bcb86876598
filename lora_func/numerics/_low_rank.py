"""The views of ``W' = W + s B A``, which LoRA shares with variants that only start elsewhere."""

from collections.abc import Mapping

from torch import Tensor

from lora_func.numerics._linalg import low_rank_norm
from lora_func.numerics._products import beside, scaled
from lora_func.weights._layers import Weight, dense

LOW_RANK = {"A": "r d_in", "B": "d_out r", "_scale": ""}
"""The leaves."""


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W) + s x Aᵀ Bᵀ``.

    Returns:
        Shape (..., d_out).
    """
    return beside(x, W, params["A"], params["B"], scale=params["_scale"])


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W + s B A``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    return W + (scaled(params["B"], params["_scale"]) @ params["A"]).to(W.dtype)


def delta_norm(params: Mapping[str, Tensor]) -> Tensor:
    """Compute the norm of ``s B A``.

    Returns:
        Shape ().
    """
    return low_rank_norm(params["A"], params["B"], params["_scale"])
