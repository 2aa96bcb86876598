"""RandLoRA: a change of full rank from random matrices that all layers share, and trained gains.

    W' = W + s Σ_j B_j diag(λ_j) A diag(γ_j),   s = alpha / r;   transposed where d_in > d_out

The sum has n = ⌈min(d_out, d_in) / r⌉ terms of rank r. A and the B_j are constants under ``*``.

*Identity at the start because* λ = 0, so the added term is exactly zero in every dtype.

Asks of W: ``linear`` only. With more rows of activations than half the width of W, the change is
made as a matrix of the size of W.

References:
    https://arxiv.org/abs/2502.00987, eq. 3-4. Code: huggingface/peft
    ``tuners/randlora/{layer,model}.py``.

Deviations: PEFT pairs the columns of the B_j with the gains in another order than the paper; since
the columns are random alike, this is another name for the same method, and we follow PEFT, whose
checkpoints need it. PEFT draws A and B in half precision; here they are drawn in single precision.
The usual rank is 32 and the scale 20; the learning rate is that of LoRA or higher.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from lora_func.checks import check_choice
from lora_func.configs import LowRankConfig
from lora_func.numerics import (
    DROPOUT,
    add_dense,
    add_low_rank,
    dropout_leaf,
    dropout_setting,
    scaled,
)
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant, prepared
from lora_func.variants._low_rank import alpha_of, scale_like
from lora_func.weights import Affine, Weight, dense

Leaves = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class RandLoRA(LowRankConfig):
    """Full-rank parameter-efficient fine-tuning from random bases.

    Attributes:
        bases: The distribution of A and B: "dense" (uniform), "sparse" (two thirds are zero), or
            "very_sparse" (all but one in √width).

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.RandLoRA(r=2))
        >>> {key: tuple(leaf.shape) for key, leaf in lf.partition(params)[0].items()}
        {'0.randlora.lambda': (2, 2), '0.randlora.gamma': (2, 3)}
    """

    usual_scale: ClassVar[float] = 20.0
    r: int = 32
    bases: Literal["dense", "sparse", "very_sparse"] = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bases", self.bases, ("dense", "sparse", "very_sparse"))
        if self.rank_pattern:
            raise ValueError(
                "rank_pattern: the sites of RandLoRA share matrices of one rank; use one rank"
            )


def shared(weights: Mapping[str, Weight], cfg: RandLoRA, generator: Generator) -> dict[str, Tensor]:
    """Draw the bases, with entries of a standard deviation of 1.

    Returns:
        _A (r, 1, low) and _B (high, terms, r), where low and high are the smaller and the larger
        one of the widest d_in and the widest d_out.
    """
    low, high = sorted(max(W.shape[i] for W in weights.values()) for i in (0, 1))
    one_in = {"dense": 1.0, "sparse": 3.0, "very_sparse": low**0.5}[cfg.bases]
    leaves = {}
    for name, shape in (("_A", (cfg.r, 1, low)), ("_B", (high, -(-low // cfg.r), cfg.r))):
        drawn = torch.rand(shape, generator=generator, dtype=torch.float32)
        if cfg.bases == "dense":
            drawn = 2 * drawn - 1
        else:
            drawn = (drawn > 1 - 0.5 / one_in).float() - (drawn < 0.5 / one_in).float()
        spread = drawn.std() if drawn.numel() > 1 else drawn.abs().mean()
        leaves[name] = drawn / spread.clamp(min=1e-3)
    return leaves


def init(W: Weight, cfg: RandLoRA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Set λ to zero and γ to a small constant.

    Returns:
        lambda (r, terms), gamma (terms, min(d_out, d_in)), _scale (); _dropout () if there is any.
    """
    low = min(W.shape)
    terms = -(-low // cfg.r)
    return {
        "lambda": torch.zeros(cfg.r, terms),
        "gamma": torch.full((terms, low), 1 / max(terms, low)),
        "_scale": torch.tensor(cfg.scale, dtype=torch.float64),
        **dropout_leaf(cfg.dropout),
    }


def prepare(params: Leaves, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Compute ``s λ``.

    Returns:
        gains (r terms,).
    """
    return {"gains": scaled(params["lambda"], params["_scale"]).flatten(-2).to(dtype)}


def _factors(params: Leaves, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors around the gains: (r terms, d_in) and (d_out, r terms)."""
    d_out, d_in = shape
    A, B, gamma = (params[leaf].to(dtype) for leaf in ("_A", "_B", "gamma"))
    terms, low = gamma.shape[-2:]
    rows = (A[..., :low] * gamma.unsqueeze(-3)).flatten(-3, -2)
    columns = B[..., : max(shape), :terms, :].flatten(-2)
    return (rows, columns) if d_in <= d_out else (columns.mT, rows.mT)


def apply(W: Weight, params: Leaves, x: Tensor) -> Tensor:
    """Compute ``linear(x, W) + drop(x) Δᵀ`` from the factors of Δ, or with Δ as one matrix.

    Returns:
        Shape (..., d_out).
    """
    if "gains" not in params:
        params = prepared(prepare, params, W, x.dtype)
    (down, up), gains = _factors(params, W.shape, x.dtype), params["gains"].to(x.dtype)
    many = x.shape[:-1].numel() > min(W.shape) / 2
    if many and down.ndim == 2 and DROPOUT not in params:
        return add_dense(x, W, (up * gains) @ down)
    return add_low_rank(x, W, down, up, gains, rate=params.get(DROPOUT))


def weight(W: Weight, params: Leaves) -> Tensor:
    """Compute ``W + Δ``.

    Returns:
        Shape (d_out, d_in).
    """
    W, dtype = dense(W), params["lambda"].dtype
    made = prepared(prepare, params, W, dtype)
    down, up = _factors(made, W.shape, dtype)
    return W + ((up * made["gains"]) @ down).to(W.dtype)


def _peft_settings(leaves: Leaves, shape: tuple[int, int]) -> dict[str, Any]:
    r = leaves["lambda"].shape[-2]
    return {
        "r": r,
        "randlora_alpha": alpha_of(leaves["_scale"], r),
        **dropout_setting("randlora_dropout", leaves),
    }


def _peft_constants(config: Mapping[str, Any], leaves: Leaves, W: Affine) -> dict[str, Tensor]:
    scale = scale_like(config["randlora_alpha"] / config["r"], leaves["lambda"])
    return {**scale, **dropout_leaf(config["randlora_dropout"])}


VARIANT = Variant(
    name="randlora",
    config=RandLoRA,
    family="shared",
    init=init,
    apply=apply,
    prepare=prepare,
    casts=("gamma", "_A", "_B"),
    weight=weight,
    shared=shared,
    leaves={
        "lambda": "r terms",
        "gamma": "terms low",
        "_A": "r 1 widest_low",
        "_B": "widest_high most_terms r",
        "_scale": "",
        "_dropout?": "",
    },
    peft=(
        PeftFormat(
            "RANDLORA",
            leaves={"lambda": PeftLeaf("randlora_lambda"), "gamma": PeftLeaf("randlora_gamma")},
            settings=_peft_settings,
            constants=_peft_constants,
            defaults={"r": 32, "randlora_alpha": 640, "randlora_dropout": 0.0},
            ignored=(
                *("projection_prng_key", "save_projection", "sparse", "very_sparse"),
                "init_weights",
            ),
            shared={"_A": "base_model.randlora_A", "_B": "base_model.randlora_B"},
            copies=("randlora_A", "randlora_B"),
            layers=("Linear", "Conv1D"),
        ),
    ),
    trials={
        "randlora": Trial({"r": 16}, peft=("RandLoraConfig", {"r": 16, "randlora_alpha": 320}))
    },
    stacks=True,
    builds_dense=True,
)
