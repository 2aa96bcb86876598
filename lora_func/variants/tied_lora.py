"""Tied LoRA: LoRA whose A is one trained matrix that all sites share.

    W' = W + s B A[:, :d_in],   s = alpha / r

*Identity at the start because* B = 0, so the added term is exactly zero in every dtype.

Asks of W: ``linear`` only.

References:
    ShareLoRA, https://arxiv.org/abs/2406.10785, section 3 ("ShareA"); Tied-LoRA,
    https://arxiv.org/abs/2311.09578.

Deviations: the papers share A among layers of one shape; here one A is as wide as the widest site,
and each site uses its first d_in columns, as VeRA does. Tied-LoRA also ties B and trains gains
around both, which is ``VeRA`` with trained projections, and not offered. A is a trained leaf under
``*``: its gradient is the sum over all sites. Rank, scale and learning rate are those of LoRA.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.configs import LowRankConfig
from lora_func.numerics import (
    DROPOUT,
    add_low_rank,
    dropout_leaf,
    kaiming_uniform,
    low_rank_norm,
    scaled,
)
from lora_func.variant import Trial, Variant, prepared
from lora_func.variants._low_rank import prepare
from lora_func.weights import Weight, dense


@dataclass(frozen=True, kw_only=True)
class TiedLoRA(LowRankConfig):
    """LoRA with one A for all sites.

    Examples:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        >>> params = lf.init(model, lf.TiedLoRA(r=2))
        >>> {key: tuple(leaf.shape) for key, leaf in lf.partition(params)[0].items()}
        {'*.tied_lora.A': (2, 8), '0.tied_lora.B': (8, 2), '1.tied_lora.B': (3, 2)}
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_pattern:
            raise ValueError(
                "rank_pattern: the sites of a tied LoRA share A, and so its rank; use several "
                "configs of LoRA for other ranks"
            )


def shared(weights: Mapping[str, Weight], cfg: TiedLoRA, generator: Generator) -> dict[str, Tensor]:
    """Draw A.

    Returns:
        A (r, widest d_in).
    """
    return {"A": kaiming_uniform(cfg.r, max(W.shape[1] for W in weights.values()), generator)}


def init(W: Weight, cfg: TiedLoRA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Leave B at zero.

    Returns:
        B (d_out, r), _scale (); _dropout () if there is any.
    """
    return {
        "B": torch.zeros(W.shape[0], cfg.r),
        "_scale": torch.tensor(cfg.scale, dtype=torch.float64),
        **dropout_leaf(cfg.dropout),
    }


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W) + s drop(x) Aᵀ Bᵀ`` with the first columns of A.

    Returns:
        Shape (..., d_out).
    """
    if "up" not in params:
        params = prepared(prepare, params, W, x.dtype)
    A = params["A"][..., : W.shape[-1]]
    return add_low_rank(x, W, A, params["up"], rate=params.get(DROPOUT))


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W + s B A``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    B = scaled(params["B"], params["_scale"])
    return W + (B @ params["A"][..., : W.shape[-1]]).to(W.dtype)


def delta_norm(params: Mapping[str, Tensor], shape: tuple[int, int] | None) -> Tensor | None:
    """Compute the norm of ``s B A``; A is wider than the site, so the shape is needed.

    Returns:
        Shape (), or None without a shape.
    """
    if shape is None:
        return None
    return low_rank_norm(params["A"][..., : shape[1]], params["B"], params["_scale"])


VARIANT = Variant(
    name="tied_lora",
    config=TiedLoRA,
    family="shared",
    init=init,
    apply=apply,
    prepare=prepare,
    casts=("A",),
    weight=weight,
    shared=shared,
    leaves={"A": "r widest_in", "B": "d_out r", "_scale": "", "_dropout?": ""},
    delta_norm=delta_norm,
    trials={"tied-lora": Trial()},
    pads=True,
    stacks=True,
    products_only=True,
)
