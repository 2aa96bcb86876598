"""PSOFT: a trained rotation between the principal singular directions of the weight.

    W' = W + U diag(S) (R - I) Vᵀ,   R = diag(b) (I + K) (I - K)⁻¹ diag(a)

U, S, V are the r largest singular triplets of W, K is skew-symmetric, a and b are gains.

*Identity at the start because* K = 0 and a = b = 1, so that R - I is exactly zero.

Asks of W: the dense weight at init; ``linear`` only afterwards.

References:
    https://arxiv.org/abs/2505.11235, eq. 8. Code: huggingface/peft ``tuners/psoft/layer.py``.

Deviations: PEFT has a scale that cancels in this start, and a second start and randomised SVDs,
which are refused when they are read. It does not store U, S, V but calculates them again, and the
signs of singular vectors change what K means: ``_A`` and ``_B`` are leaves here, and it is written
as a LoRA. The usual rank is 32, the learning rate that of OFT.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from lora_func.checks import check_flag
from lora_func.configs import DropoutConfig, RankConfig
from lora_func.numerics import (
    DROPOUT,
    add_low_rank,
    at_least_float32,
    cayley,
    dropout_leaf,
    low_rank_norm,
    skew,
    svd,
)
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant, prepared
from lora_func.variants._low_rank import PEFT_FORMATS
from lora_func.weights import Affine, Weight, dense


@dataclass(frozen=True, kw_only=True)
class PSOFT(DropoutConfig, RankConfig):
    """Principal subspace orthogonal fine-tuning.

    Attributes:
        gains: Whether the gains a and b are trained; without them R is a rotation.

    Example:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(6, 5)), lf.PSOFT(r=4))
        >>> {key: tuple(leaf.shape) for key, leaf in lf.partition(params)[0].items()}
        {'0.psoft.K': (6,), '0.psoft.a': (4,), '0.psoft.b': (4,)}
    """

    r: int = 32
    gains: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("gains", self.gains)
        for r in (self.r, *self.rank_pattern.values()):
            if r < 2:
                raise ValueError(f"r: got {r}, expected at least 2; one direction has no rotation")


def init(W: Weight, cfg: PSOFT, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Take the singular triplets; start without rotation.

    Returns:
        K (r (r - 1) / 2), the strict upper triangle, row by row; a and b (r,) with gains; _A (r,
        d_in), _B (d_out, r); _dropout () if there is any.
    """
    gains = {"a": torch.ones(cfg.r), "b": torch.ones(cfg.r)} if cfg.gains else {}
    trained = {"K": torch.zeros(cfg.r * (cfg.r - 1) // 2), **gains}
    return {**trained, **_subspace(dense(W), cfg.r), **dropout_leaf(cfg.dropout)}


def _subspace(W: Tensor, r: int) -> dict[str, Tensor]:
    U, S, Vh = svd(W, r)
    return {"_A": Vh, "_B": U * S}


def _core(params: Mapping[str, Tensor]) -> Tensor:
    """R - I, exactly 0 at the start."""
    E = cayley(at_least_float32(skew(params["K"])))
    if "a" not in params:
        return E
    a, b = params["a"].to(E.dtype), params["b"].to(E.dtype)
    gains = b.unsqueeze(-1) * a.unsqueeze(-2)
    return E * gains + torch.diag_embed(a * b - 1)


def _up(params: Mapping[str, Tensor]) -> Tensor:
    core = _core(params)
    up: Tensor = params["_B"].to(core.dtype) @ core
    return up


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Compute ``U diag(S) (R - I)``.

    Returns:
        up (d_out, r).
    """
    return {"up": _up(params).to(dtype)}


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W) + drop(x) (U diag(S) (R - I) Vᵀ)ᵀ``.

    Returns:
        Shape (..., d_out).
    """
    if "up" not in params:
        params = prepared(prepare, params, W, x.dtype)
    return add_low_rank(x, W, params["_A"], params["up"], rate=params.get(DROPOUT))


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W + U diag(S) (R - I) Vᵀ``.

    Returns:
        Shape (d_out, d_in).
    """
    W, up = dense(W), _up(params)
    return W + (up @ params["_A"].to(up.dtype)).to(W.dtype)


def delta_norm(params: Mapping[str, Tensor], shape: tuple[int, int] | None) -> Tensor:
    """Compute the norm of the change.

    Returns:
        Shape ().
    """
    return low_rank_norm(params["_A"], up := _up(params), up.new_ones(()))


def low_rank(params: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Give the factors, the core in B.

    Returns:
        One pair, shapes (..., r, d_in) and (..., d_out, r).
    """
    up = _up(params)
    return [(params["_A"].to(up.dtype), up)]


def _as_lora(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ((A, B),) = low_rank(leaves)
    kept = {DROPOUT: leaves[DROPOUT]} if DROPOUT in leaves else {}
    return {"A": A, "B": B, "_scale": A.new_ones(()), **kept}


def _peft_constants(
    config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Affine
) -> dict[str, Tensor]:
    subspace = _subspace(dense(W), config["r"])
    return {**subspace, **dropout_leaf(config["psoft_dropout"])}


_NAMES = {"K": "weight", "a": "vector_a", "b": "vector_b"}


def _format(*leaves: str) -> PeftFormat:
    return PeftFormat(
        "PSOFT",
        leaves={leaf: PeftLeaf(f"psoft_R.{_NAMES[leaf]}") for leaf in leaves},
        constants=_peft_constants,
        holds=lambda leaves: False,
        defaults={"r": 32, "psoft_dropout": 0.0},
        inert={
            "ab_svd_init": (None, "psoft_init"),
            "psoft_svd": (None, "full"),
            "psoft_orth": (None, True),
            "use_cayley_neumann": (None, False),
        },
        ignored=(
            *("psoft_alpha", "psoft_svd_lowrank_niter", "random_seed", "psoft_mag_a"),
            *("psoft_mag_b", "num_cayley_neumann_terms", "cayley_neumann_eps", "init_weights"),
        ),
        layers=("Linear", "Conv1D"),
    )


VARIANT = Variant(
    name="psoft",
    config=PSOFT,
    family="SVD",
    init=init,
    apply=apply,
    prepare=prepare,
    casts=("_A",),
    weight=weight,
    delta_norm=delta_norm,
    leaves={
        "K": "upper",
        "a?": "r",
        "b?": "r",
        "_A": "r d_in",
        "_B": "d_out r",
        "_dropout?": "",
    },
    low_rank=low_rank,
    peft=(
        *(one._replace(convert=_as_lora) for one in PEFT_FORMATS),
        *(_format("K", "a", "b"), _format("K")),
    ),
    trials={"psoft": Trial({"r": 16}, lr=3e-3, peft=("PsoftConfig", {"r": 16, "psoft_alpha": 16}))},
    stacks=True,
    products_only=True,
)
