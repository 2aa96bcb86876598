"""GraLoRA: a low-rank term of its own for each of k x k blocks of the weight.

    Δ[j, i] = s B[j, i] A[i, j],   each of rank r / k;   s = alpha / (r + hybrid_r)

Block i of the input goes to block j of the output. A hybrid adds ``s B_general A_general``, a LoRA
of rank hybrid_r. The change has rank k r at the cost and with the parameters of a LoRA of rank r.

*Identity at the start because* B = 0, so the added term is exactly zero in every dtype.

Asks of W: ``linear`` only.

References:
    https://arxiv.org/abs/2505.20355, eq. 7. Code: SqueezeBits/GraLoRA, huggingface/peft
    ``tuners/gralora/layer.py``.

Deviations: none in the numbers. PEFT fails on activations without rows. The usual rank is 32 with
k = 2, the scale 2, the learning rate that of LoRA.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Generator, Tensor

from lora_func.checks import check_count
from lora_func.configs import LowRankConfig
from lora_func.numerics import (
    DROPOUT,
    add_low_rank,
    dropout,
    dropout_leaf,
    dropout_setting,
    kaiming_uniform,
    low_rank_norm,
    low_rank_term,
    scaled,
)
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant, prepared
from lora_func.variants._low_rank import alpha_of, scale_like
from lora_func.weights import Affine, Weight, dense, linear

Leaves = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class GraLoRA(LowRankConfig):
    """Granular low-rank adaptation; alpha is divided by ``r + hybrid_r``.

    Attributes:
        k: The number of blocks on each side; divides r, d_in and d_out.
        hybrid_r: The rank of a LoRA that is added; 0 for none.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), lf.GraLoRA(r=2))
        >>> {key: tuple(leaf.shape) for key, leaf in params.items()}
        {'0.gralora.A': (2, 3, 2), '0.gralora.B': (2, 2, 2), '0.gralora._scale': ()}
    """

    r: int = 32
    k: int = 2
    hybrid_r: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("k", self.k)
        check_count("hybrid_r", self.hybrid_r, least=0)

    @property
    def scale(self) -> float:
        """The factor ``s``."""
        return self.usual_scale if self.alpha is None else self.alpha / (self.r + self.hybrid_r)


def init(W: Weight, cfg: GraLoRA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw A, leave B at zero.

    Returns:
        A (k, d_in / k, r), B (k, r, d_out / k), _scale (); of a hybrid A_general (hybrid_r, d_in)
        and B_general (d_out, hybrid_r); _dropout () if there is any.

    Raises:
        ValueError: If k does not divide r, d_in or d_out.
    """
    (d_out, d_in), k, r = W.shape, cfg.k, cfg.r
    for name, size in (("r", r), ("d_in", d_in), ("d_out", d_out)):
        if size % k:
            raise ValueError(f"k = {k} does not divide {name} = {size}; choose a divisor")
    leaves = {
        "A": kaiming_uniform(k * r, d_in // k, generator).reshape(k, d_in // k, r),
        "B": torch.zeros(k, r, d_out // k),
        "_scale": torch.tensor(cfg.scale, dtype=torch.float64),
        **dropout_leaf(cfg.dropout),
    }
    if cfg.hybrid_r:
        leaves["A_general"] = kaiming_uniform(cfg.hybrid_r, d_in, generator)
        leaves["B_general"] = torch.zeros(d_out, cfg.hybrid_r)
    return leaves


def prepare(params: Leaves, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Split the factors by blocks of the other side, the scale in B.

    Returns:
        down (k, d_in / k, k, r / k) and up (k, k, r / k, d_out / k); of a hybrid general_up.
    """
    k, B = params["A"].shape[-3], params["B"]
    split = {
        "down": rearrange(params["A"], "... i d (j rho) -> ... i d j rho", j=k),
        "up": rearrange(B * _along(params["_scale"], B), "... j (i rho) o -> ... j i rho o", i=k),
    }
    if "B_general" in params:
        split["general_up"] = scaled(params["B_general"], params["_scale"])
    return {name: leaf.to(dtype) for name, leaf in split.items()}


def _along(scale: Tensor, B: Tensor) -> Tensor:
    return scale.to(B.dtype).reshape(*scale.shape, 1, 1, 1)


def apply(W: Weight, params: Leaves, x: Tensor) -> Tensor:
    """Compute ``linear(x, W)`` plus the product with each block.

    Returns:
        Shape (..., d_out).
    """
    if "up" not in params:
        params = prepared(prepare, params, W, x.dtype)
    down, up = params["down"].to(x.dtype), params["up"].to(x.dtype)
    if "general_up" not in params:
        x, y = dropout(x, params.get(DROPOUT)), linear(x, W)
    elif DROPOUT not in params:
        y = add_low_rank(x, W, params["A_general"], params["general_up"])
    else:  # both terms have one mask
        x, y = dropout(x, params[DROPOUT]), linear(x, W)
        y = y + low_rank_term(x, params["A_general"], params["general_up"])
    if down.ndim == 4:  # one adapter is a stack of one
        down, up = down[None], up[None]
    blocks = x.reshape(len(down), -1, down.shape[1], down.shape[2])
    h = einsum(blocks, down, "K n i d, K i d j rho -> K n j i rho")
    change = einsum(h, up, "K n j i rho, K j i rho o -> K n j o")
    return y + change.reshape(y.shape).to(y.dtype)


def low_rank(params: Leaves) -> list[tuple[Tensor, Tensor]]:
    """Give the factors of rank k r, which are zero outside of their blocks, the scale in B.

    Returns:
        One pair, shapes (..., k r, d_in) and (..., d_out, k r); two of a hybrid.
    """
    k = params["A"].shape[-3]
    split = prepare(params, (0, 0), params["B"].dtype)
    eye = torch.eye(k, dtype=split["up"].dtype, device=split["up"].device)
    A = einsum(split["down"], eye.to(split["down"].dtype), "... i d j rho, i e -> ... i j rho e d")
    B = einsum(split["up"], eye, "... j i rho o, j e -> ... e o i j rho")
    factors = [(A.flatten(-2).flatten(-4, -2), B.flatten(-3).flatten(-3, -2))]
    return factors + ([(params["A_general"], split["general_up"])] if "general_up" in split else [])


def weight(W: Weight, params: Leaves) -> Tensor:
    """Compute ``W + Δ``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    return W + sum(B @ A for A, B in low_rank(params)).to(W.dtype)  # type: ignore[union-attr]


def delta_norm(params: Leaves, shape: tuple[int, int] | None) -> Tensor:
    """Compute the norm of Δ from its factors.

    Returns:
        Shape ().
    """
    pairs = low_rank(params)
    A, B = torch.cat([A for A, _ in pairs], -2), torch.cat([B for _, B in pairs], -1)
    return low_rank_norm(A, B, B.new_ones(()))


def _peft_settings(leaves: Leaves, shape: tuple[int, int]) -> dict[str, Any]:
    k, _, r = leaves["A"].shape
    hybrid = len(leaves["A_general"]) if "A_general" in leaves else 0
    alpha = alpha_of(leaves["_scale"], r + hybrid)
    settings: dict[str, Any] = {"r": r, "hybrid_r": hybrid, "gralora_k": k, "alpha": alpha}
    return settings | dropout_setting("gralora_dropout", leaves)


def _peft_constants(config: Mapping[str, Any], leaves: Leaves, W: Affine) -> dict[str, Tensor]:
    scale = config["alpha"] / (config["r"] + config["hybrid_r"])
    return scale_like(scale, leaves["A"][0]) | dropout_leaf(config["gralora_dropout"])


_BLOCKS = {"A": PeftLeaf("gralora_A"), "B": PeftLeaf("gralora_B")}
_FORMAT = PeftFormat(
    "GRALORA",
    leaves=_BLOCKS,
    settings=_peft_settings,
    constants=_peft_constants,
    holds=lambda leaves: "A_general" not in leaves,
    defaults={"r": 32, "hybrid_r": 0, "alpha": 64, "gralora_k": 2, "gralora_dropout": 0.0},
    ignored=("init_weights",),
    layers=("Linear", "Conv1D"),
)
_GENERAL = {
    "A_general": PeftLeaf("gralora_A_general.weight"),
    "B_general": PeftLeaf("gralora_B_general.weight"),
}

VARIANT = Variant(
    name="gralora",
    config=GraLoRA,
    family="low-rank",
    init=init,
    apply=apply,
    prepare=prepare,
    casts=("A_general",),
    weight=weight,
    delta_norm=delta_norm,
    leaves={
        "A": "k d_in/k rank",
        "B": "k rank d_out/k",
        "A_general?": "hybrid_r d_in",
        "B_general?": "d_out hybrid_r",
        "_scale": "",
        "_dropout?": "",
    },
    low_rank=low_rank,
    peft=(
        _FORMAT,
        _FORMAT._replace(leaves=_BLOCKS | _GENERAL, holds=lambda leaves: "A_general" in leaves),
    ),
    trials={
        "gralora": Trial({"r": 8}, peft=("GraloraConfig", {"r": 8, "alpha": 16})),
        "gralora-hybrid": Trial(
            {"r": 8, "hybrid_r": 4}, peft=("GraloraConfig", {"r": 8, "hybrid_r": 4, "alpha": 24})
        ),
    },
    stacks=True,
)
