"""AntiPaSTO: steer a layer in the space of its singular vectors.

    V: W' = W + U [(S + c δ) (R - I)ᵀ Vᵀ + c δ Vᵀ]        h -> (h R) (S + c δ),   h = x V
    U: W' = W + [U (R - I) (S + c δ) + U c δ] Vᵀ
    both: h -> (h R_V) (S + c δ) R_Uᵀ

R = (I - X)⁻¹ (I + X) is a block-diagonal rotation, X = c A / 2, A = a tanh((T - Tᵀ) / 2a), with
a = 2 tan(max_angle / 2), T the trained strict upper triangle and c the steering coefficient.

*Identity at the start because* T = 0 and δ = 0, and only R - I and δ are applied.

Asks of W: ``dense`` at init, ``linear`` after that. Takes calibration data.

References:
    https://arxiv.org/abs/2601.07473, eq. 4, 6-8, appendix A.4-A.5. Code: wassname/AntiPaSTO, and
    ``variants/antipasto.py`` of wassname/lora-lite.

Deviations: the codes write the residual into the weight, drop the layer's bias (the authors') or
rotate the other way (lora-lite: negate T); we do none of it. The authors rotate one block of r x r
and start δ off zero; here it starts at zero, in blocks. tanh bounds entries, not angles: in blocks
larger than 2 the largest angle is ``2 atan(tan(max_angle / 2) / tan(π / 2b))``. Directions are
chosen by S times the size of the activation along them, one pool for all batches; the authors'
contrastive choice from pairs is not offered.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.checks import check_choice, check_count, check_number
from lora_func.configs import Calibration, RankConfig
from lora_func.numerics import (
    SINGULAR,
    Moments,
    add_low_rank,
    at_least_float32,
    cayley,
    join_moments,
    observe_moments,
    rotate_blocks,
    scaled,
    skew,
    without_autocast,
)
from lora_func.variant import Trial, Variant, prepared
from lora_func.variants._bases import singular_triplets
from lora_func.weights import Weight, dense

_SIDES = {"V": ("rot_V",), "U": ("rot_U",), "both": ("rot_V", "rot_U"), "none": ()}


@dataclass(frozen=True, kw_only=True)
class AntiPaSTO(RankConfig):
    """Rotation and scaling of r singular directions; the authors adapt residual writers.

    With ``init(..., data=batches)`` the directions are those with the largest S times activation;
    without data those with the largest S.

    Attributes:
        block_size: Side of a block of the rotation; divides r.
        rotate: "V" (the layer's input side), "U" (its output side), "both", which reaches every
            change inside of a block to first order, or "none" (only δ).
        max_angle: Bound of the rotation in radians, between 0 and π; see the module for blocks
            larger than 2.
        coeff: The steering coefficient c, kept as the constant ``_coeff``: -1 reverses the rotation
            and the sign of δ, 0 is the base.
        pool: The size of an activation: "rms", or "std" as in the paper's text.
    """

    r: int = 16
    block_size: int = 4
    rotate: str = "V"
    max_angle: float = math.pi / 3
    coeff: float = 1.0
    pool: str = "rms"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rotate", self.rotate, (*_SIDES,))
        check_choice("pool", self.pool, ("rms", "std"))
        check_number("coeff", self.coeff)
        check_number("max_angle", self.max_angle, above=0)
        if self.max_angle >= math.pi:
            raise ValueError(f"max_angle: got {self.max_angle!r}, expected less than π")
        check_count("block_size", self.block_size, least=2)
        for r in self.ranks:
            if self.rotate != "none" and r % self.block_size:
                raise ValueError(f"r: got {r}, expected a multiple of block_size={self.block_size}")

    @property
    def calibration(self) -> Calibration:
        """The inputs of each site."""
        return "inputs"


def init(
    W: Weight, cfg: AntiPaSTO, generator: Generator, stats: Moments | None = None
) -> dict[str, Tensor]:
    """Choose r singular directions, in the order of S.

    Returns:
        rot_V, rot_U or both (r / b, b (b - 1) / 2) and _max_angle () for a rotation; delta_s and
        _S (r,), _U (d_out, r), _Vh (r, d_in), _coeff ().
    """
    U, S, Vh = singular_triplets(W, cfg.r, cfg.pool, stats)
    b, bound = cfg.block_size, torch.tensor(cfg.max_angle, dtype=torch.float64)
    rotations = {side: torch.zeros(cfg.r // b, b * (b - 1) // 2) for side in _SIDES[cfg.rotate]}
    return {
        **rotations,
        **({"_max_angle": bound} if rotations else {}),
        "delta_s": torch.zeros(cfg.r),
        "_U": U,
        "_S": S,
        "_Vh": Vh,
        "_coeff": torch.tensor(cfg.coeff, dtype=torch.float64),
    }


def rotation(params: Mapping[str, Tensor], rot: Tensor) -> Tensor:
    """Compute R - I.

    Returns:
        Shape (..., blocks, b, b), float32 or better.
    """
    rot = at_least_float32(rot)
    a = 2 * (params["_max_angle"].to(rot.dtype) / 2).tan()
    bounded = scaled(scaled(rot / 2, 1 / a).tanh(), a)
    return cayley(skew(scaled(bounded, params["_coeff"] / 2)))


def _change(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The change in singular coordinates: blocks (..., r / b, b, b), or middle (..., r)."""
    delta = at_least_float32(params["_coeff"][..., None] * params["delta_s"])
    E = {side: rotation(params, params[side]) for side in _SIDES["both"] if side in params}
    if not E:
        return {"middle": delta}
    shape = next(iter(E.values())).shape[:-2]
    S = (params["_S"].to(delta.dtype) + delta).reshape(*shape, -1)
    change, rows = torch.diag_embed(delta.reshape(*shape, -1)), torch.diag_embed(S)
    if "rot_V" in E:
        turned = E["rot_V"] * S[..., None, :]
        change, rows = change + turned, rows + turned
    if "rot_U" in E:
        with without_autocast(rows):
            change = change + rows @ E["rot_U"].mT
    return {"blocks": change}


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Compute the change in singular coordinates.

    Returns:
        blocks (r / b, b, b), or middle (r,) if there is no rotation.
    """
    return {name: change.to(dtype) for name, change in _change(params).items()}


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Steer the activation between the singular vectors.

    Returns:
        Shape (..., d_out).
    """
    if "blocks" not in params and "middle" not in params:
        params = prepared(prepare, params, W, x.dtype)
    down, up, blocks = params["_Vh"], params["_U"], params.get("blocks")
    if blocks is None:
        return add_low_rank(x, W, down, up, params["middle"])
    return add_low_rank(x, W, down, up, bottleneck=lambda h: rotate_blocks(h, blocks))


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W'``.

    Returns:
        Shape (d_out, d_in).
    """
    W, Vh = dense(W), at_least_float32(params["_Vh"])
    change = _change(params)
    if "middle" in change:
        steered = Vh.mT * change["middle"]
    else:
        steered = rotate_blocks(Vh.mT, change["blocks"])
    return W + (params["_U"].to(steered.dtype) @ steered.mT).to(W.dtype)


_ROTATIONS = {"rot_V?": "blocks pairs", "rot_U?": "blocks pairs"}

VARIANT = Variant(
    name="antipasto",
    config=AntiPaSTO,
    family="SVD",
    init=init,
    apply=apply,
    prepare=prepare,
    casts=("_U", "_Vh"),
    weight=weight,
    observe=observe_moments,
    join=join_moments,
    leaves={**_ROTATIONS, "_max_angle?": "", "delta_s": "r", "_coeff": "", **SINGULAR},
    trials={
        "antipasto": Trial({"r": 32}, lr=1e-2, data=True),
        "antipasto-U": Trial({"r": 32, "rotate": "U"}, lr=1e-2, data=True),
        "antipasto-both": Trial({"r": 32, "rotate": "both"}, lr=1e-2, data=True),
        "antipasto-S": Trial({"r": 32, "rotate": "none"}, lr=1e-2, data=True),
    },
    stacks=True,
    products_only=True,
)
