"""MiSS: one small block of trained numbers, which the shards of the input share (formerly Bone).

    W' = W + Δ,   Δ[o, i] = D[i mod r, o mod m]

The standard form has m = d_out, the mini form a divisor m of d_out. The form "bat" multiplies the
weight: with W in r x r blocks, ``W'[o, i] = W[o, i] + (W[o, i] + I) D[o]``.

*Identity at the start because* D = 0, so the change is exactly zero in every dtype.

Asks of W: ``linear`` only; "bat" the dense weight in each call.

References:
    https://arxiv.org/abs/2409.15371. Code: huggingface/peft ``tuners/miss/layer.py``; Joluck/Bone,
    whose checkpoints PEFT's ``convert-bone-to-miss.py`` renames.

Deviations: PEFT repeats the mini block along the output before the product, we repeat the product.
PEFT takes an unknown form for the standard one; we refuse it. With "bat" PEFT ignores dropout; we
refuse it. The method's usual rank is 64, its learning rate that of LoRA; it has no scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor

from lora_func.checks import check_choice, check_count
from lora_func.configs import DropoutConfig, RankConfig
from lora_func.numerics import DROPOUT, add_dense, dropout, dropout_leaf, dropout_setting
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant
from lora_func.weights import Weight, dense, linear

Form = Literal["standard", "mini", "bat"]


@dataclass(frozen=True, kw_only=True)
class MiSS(DropoutConfig, RankConfig):
    """Matrix shard sharing; r is the length of a shard of the input.

    Attributes:
        form: "standard": a block (r, d_out). "mini": a block (r, mini_r), repeated along the
            output. "bat": blocks (r, r) that multiply the weight.
        mini_r: The width of the mini block; divides d_out.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.MiSS(r=2))
        >>> params["0.miss.block"].shape
        torch.Size([2, 3])
    """

    r: int = 64
    form: Form = "standard"
    mini_r: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, get_args(Form))
        check_count("mini_r", self.mini_r)
        if self.form == "bat" and self.dropout:
            raise ValueError('dropout: form "bat" multiplies the weight and has no term to drop')

    @property
    def variant(self) -> str:
        """The name that belongs to the form."""
        return "miss_bat" if self.form == "bat" else "miss"


def init(W: Weight, cfg: MiSS, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Start with a block of zeros.

    Returns:
        block, shape (r, d_out), (r, mini_r) or (d_out / r, r, r); _dropout () if there is any.

    Raises:
        ValueError: If r exceeds d_in, or a size does not divide the weight.
    """
    d_out, d_in = W.shape
    if cfg.r > d_in:
        raise ValueError(f"r = {cfg.r} exceeds d_in = {d_in}; lower r or rank_pattern")
    if cfg.form == "bat":
        if d_in % cfg.r or d_out % cfg.r:
            raise ValueError(f"r = {cfg.r} does not divide d_in = {d_in} and d_out = {d_out}")
        return {"block": torch.zeros(d_out // cfg.r, cfg.r, cfg.r)}
    if d_out % cfg.mini_r:
        raise ValueError(f"mini_r = {cfg.mini_r} does not divide d_out = {d_out}")
    width = cfg.mini_r if cfg.form == "mini" else d_out
    return {"block": torch.zeros(cfg.r, width), **dropout_leaf(cfg.dropout)}


def _summed_shards(x: Tensor, r: int) -> Tensor:
    """Sum the shards of length r of activations; the last one may be shorter."""
    missing = -x.shape[-1] % r
    x = F.pad(x, (0, missing)) if missing else x
    shards: Tensor = rearrange(x, "... (shard r) -> ... shard r", r=r)
    return shards.sum(-2)


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W)`` plus the sum of the shards of x times the block.

    Returns:
        Shape (..., d_out).
    """
    y, block = linear(x, W), params["block"].to(x.dtype)
    shards = _summed_shards(dropout(x, params.get(DROPOUT)), block.shape[-2])
    change, tiles = shards @ block, y.shape[-1] // block.shape[-1]
    if tiles == 1:
        return y + change
    tiled: Tensor = rearrange(y, "... (tile m) -> ... tile m", tile=tiles) + change.unsqueeze(-2)
    return tiled.flatten(-2)


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W + Δ``.

    Returns:
        Shape (d_out, d_in).
    """
    W, block = dense(W), params["block"]
    d_out, d_in = W.shape[-2:]
    r, width = block.shape[-2:]
    rows = torch.arange(d_in, device=block.device) % r
    columns = torch.arange(d_out, device=block.device) % width
    return W + block[..., rows[:, None], columns].mT.to(W.dtype)


def delta_norm(params: Mapping[str, Tensor], shape: tuple[int, int] | None) -> Tensor | None:
    """Compute the norm of Δ.

    Returns:
        Shape (); None without a shape.
    """
    if shape is None:
        return None
    block, (d_out, d_in) = params["block"].double(), shape
    r, width = block.shape[-2:]
    often = (d_in - torch.arange(r, device=block.device) + r - 1) // r * (d_out // width)
    return (block.square().sum(-1) * often).sum(-1).sqrt()


def _bat_change(W: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``(W + I) D`` in each block."""
    block = params["block"].to(W.dtype)
    blocks = rearrange(W, "(o a) (i b) -> o a i b", a=block.shape[-1], b=block.shape[-1])
    change: Tensor = blocks @ block.unsqueeze(-3) + block.unsqueeze(-2)
    return change.flatten(-2).flatten(-3, -2)


def bat_weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W + (W + I) D`` in each block.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    return W + _bat_change(W, params)


def bat_apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W')``.

    Returns:
        Shape (..., d_out).
    """
    return add_dense(x, W, _bat_change(dense(W), params))


def _peft_settings(leaves: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
    r, width = leaves["block"].shape[-2:]
    form = {"init_weights": True} if width == shape[0] else {"init_weights": "mini"}
    mini = {} if width == shape[0] else {"mini_r": width}
    return {"r": r, **form, **mini, **dropout_setting("miss_dropout", leaves)}


_PEFT = PeftFormat(
    "MISS",
    leaves={"block": PeftLeaf("miss_block")},
    settings=_peft_settings,
    constants=lambda config, leaves, W: dropout_leaf(config["miss_dropout"]),
    means=lambda config, path: config.get("init_weights") != "bat",
    defaults={"r": 64, "mini_r": 1, "miss_dropout": 0.0},
    inert={"init_weights": (None, True, False, "mini", "bat")},
)
_PEFT_BAT = _PEFT._replace(
    settings=lambda leaves, shape: {"r": leaves["block"].shape[-1], "init_weights": "bat"},
    constants=lambda config, leaves, W: {},  # PEFT drops nothing there
    means=lambda config, path: config.get("init_weights") == "bat",
)

MISS = Variant(
    name="miss",
    config=MiSS,
    family="low-rank",
    init=init,
    apply=apply,
    casts=("block",),
    weight=weight,
    delta_norm=delta_norm,
    leaves={"block": "r d_out/tiles", "_dropout?": ""},
    neutral={"block": 0.0},
    peft=(_PEFT,),
    trials={
        "miss": Trial({"r": 16}, peft=("MissConfig", {"r": 16})),
        "miss-mini": Trial(
            {"r": 16, "form": "mini", "mini_r": 8},
            lr=3e-3,
            peft=("MissConfig", {"r": 16, "init_weights": "mini", "mini_r": 8}),
        ),
    },
    stacks=True,
)

BAT = Variant(
    name="miss_bat",
    config=MiSS,
    family="multiplicative",
    init=init,
    apply=bat_apply,
    casts=("block",),
    weight=bat_weight,
    leaves={"block": "d_out/r r r"},
    peft=(_PEFT_BAT,),
    trials={
        "miss-bat": Trial(
            {"r": 16, "form": "bat"}, peft=("MissConfig", {"r": 16, "init_weights": "bat"})
        )
    },
    stacks=True,
    builds_dense=True,
)

VARIANTS = (MISS, BAT)
