"""OFT: a trained block-diagonal rotation of the input.

    W' = W Rᵀ,   R = (I + Q) (I - Q)⁻¹ in each block, Q skew-symmetric

*Identity at the start because* Q = 0, and the input is x + x (R - I).

Asks of W: ``linear`` only.

References:
    https://arxiv.org/abs/2306.07280; OFTv2, the form on the input,
    https://arxiv.org/abs/2506.19847. Code: Zeju1997/oft, huggingface/peft ``tuners/oft/layer.py``.

Deviations: PEFT's exact branch computes the inverse of what its Neumann branch approximates; we
follow the paper in both (negate R when you bring a checkpoint with ``use_cayley_neumann=False``).
PEFT changes a block size that does not divide d_in; we refuse it. Its ``coft`` shortens R in each
forward pass, in place; here ``project`` does so after a step. With q = ‖Q‖₂ the series is off
orthogonality by ``4 q²`` for 2 terms, from 4 on by ``q^(2(t-1))`` for an even number t of them and
by about ``2 q^(t-1)`` for an odd one, so 4 is better than 5; for q ≥ 1 it does not converge.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lora_func.checks import check_count, check_number
from lora_func.configs import LinearConfig
from lora_func.numerics import (
    at_least_float32,
    cayley,
    rotate_blocks,
    skew,
    without_autocast,
)
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant, prepared
from lora_func.weights import Weight, dense, linear


@dataclass(frozen=True, kw_only=True)
class OFT(LinearConfig):
    """Orthogonal fine-tuning.

    Attributes:
        block_size: Side of a block; divides d_in.
        neumann_terms: None for the exact Cayley transform; else how many terms of its Neumann
            series, counted as PEFT's ``num_cayley_neumann_terms`` (there 5 by default): 2 is
            ``I + 2 Q``, 3 and 4 are ``I + 2 Q + 2 Q² + Q³``.
        share: Whether one block acts at all places (PEFT's ``block_share``).
        coft: A bound to which ``project`` shortens Q: ``‖Q‖ ≤ coft / √blocks`` for each block; None
            for no bound. PEFT calls it ``eps``, 6e-5 by default.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(8, 3)), lf.OFT(block_size=4))
        >>> params["0.oft.R"].shape
        torch.Size([2, 6])
    """

    block_size: int = 32
    neumann_terms: int | None = None
    share: bool = False
    coft: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("block_size", self.block_size, least=2)
        if self.neumann_terms is not None:
            check_count("neumann_terms", self.neumann_terms, least=2)
        if self.coft is not None:
            check_number("coft", self.coft, above=0)


def init(W: Weight, cfg: OFT, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Start without a rotation.

    Returns:
        R (blocks, b (b - 1) / 2), or (1, ...) if it is shared: the strict upper triangles of Q, row
        by row; _neumann (terms,), ones, whose number is what counts; _coft () if there is a bound.

    Raises:
        ValueError: If the block size does not divide d_in.
    """
    (_, d_in), b = W.shape, cfg.block_size
    if d_in % b:
        raise ValueError(f"block_size = {b} does not divide d_in = {d_in}; choose a divisor")
    leaves = {"R": torch.zeros(1 if cfg.share else d_in // b, b * (b - 1) // 2)}
    if cfg.neumann_terms is not None:
        leaves["_neumann"] = torch.ones(cfg.neumann_terms)
    if cfg.coft is not None:
        leaves["_coft"] = torch.tensor(cfg.coft, dtype=torch.float64)
    return leaves


def rotation(params: Mapping[str, Tensor], d_in: int) -> Tensor:
    """Compute R - I.

    Returns:
        Shape (blocks, b, b), float32 or better.
    """
    Q = at_least_float32(skew(params["R"]))
    turn = _series(Q, params["_neumann"].shape[-1]) if "_neumann" in params else cayley(Q)
    return turn.expand(*turn.shape[:-3], d_in // turn.shape[-1], -1, -1)


def _series(Q: Tensor, terms: int) -> Tensor:
    if terms == 2:
        return 2 * Q
    with without_autocast(Q):
        powers = Q
        for _ in range(max(terms, 4) - 3):
            powers = Q + Q @ powers
        return powers + Q + Q @ powers


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Compute ``R - I``.

    Returns:
        turn.
    """
    return {"turn": rotation(params, shape[1]).to(dtype)}


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Rotate the input.

    Returns:
        Shape (..., d_out).
    """
    if "turn" not in params:
        params = prepared(prepare, params, W, x.dtype)
    return linear(x + rotate_blocks(x, params["turn"]), W)


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W Rᵀ``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    return W + rotate_blocks(W, rotation(params, W.shape[-1]).mT)


def project(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shorten Q to its bound, if there is one.

    Returns:
        R, or nothing.
    """
    if "_coft" not in params:
        return {}
    R = params["R"]
    longest = params["_coft"][..., None, None].to(R.dtype) / math.sqrt(R.shape[-2])
    length = math.sqrt(2) * R.norm(dim=-1, keepdim=True)
    return {"R": torch.where(length <= longest, R, R * (longest / length))}


def _peft_settings(leaves: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
    blocks, pairs = leaves["R"].shape
    size = (1 + math.isqrt(1 + 8 * pairs)) // 2
    settings: dict[str, Any] = {"r": 0, "oft_block_size": size}
    settings |= {"block_share": blocks * size < shape[1], "coft": "_coft" in leaves}
    if "_coft" in leaves:
        settings["eps"] = leaves["_coft"].item()
        if not torch.allclose(project(leaves)["R"], leaves["R"]):
            raise ValueError("R: is out of the bound of coft, which PEFT enforces; use project")
    if "_neumann" not in leaves:
        return settings | {"use_cayley_neumann": False}
    terms = leaves["_neumann"].shape[-1]
    return settings | {"use_cayley_neumann": True, "num_cayley_neumann_terms": terms}


def _peft_bound(
    config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Weight
) -> dict[str, Tensor]:
    """PEFT shortens blocks before it uses them."""
    if not config["coft"]:
        return {}
    dtype = torch.promote_types(leaves["R"].dtype, torch.float32)
    bound = {"_coft": torch.tensor(config["eps"], dtype=dtype)}
    return {**bound, **project({**leaves, **bound})}


def _peft_terms(
    config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Weight
) -> dict[str, Tensor]:
    terms = config["num_cayley_neumann_terms"]
    if terms < 2:
        raise ValueError(f"num_cayley_neumann_terms is {terms}; PEFT's rotation is then none")
    return {"_neumann": torch.ones(terms), **_peft_bound(config, leaves, W)}


def _differs_in_peft(module: Any) -> str | None:
    if isinstance(module, nn.Conv2d) and (module.kernel_size != (1, 1) or module.groups > 1):
        return "PEFT rotates patches that overlap and adds them up, which no weight does"
    return None


# PEFT's exact Cayley transform turns the other way
_PEFT = PeftFormat(
    "OFT",
    leaves={"R": PeftLeaf("oft_R.weight", torch.neg, lambda R, _: -R)},
    settings=_peft_settings,
    means=lambda config, path: not config["use_cayley_neumann"],
    holds=lambda leaves: "_neumann" not in leaves,
    constants=_peft_bound,
    defaults={
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
        "block_share": False,
        "coft": False,
        "eps": 6e-5,
    },
    ignored=("module_dropout", "oft_block_size", "r"),
    layers=("Linear", "Conv2d"),
    refuses=_differs_in_peft,
)
_PEFT_NEUMANN = _PEFT._replace(
    leaves={"R": PeftLeaf("oft_R.weight")},
    constants=_peft_terms,
    means=lambda config, path: bool(config["use_cayley_neumann"]),
    holds=lambda leaves: "_neumann" in leaves,
)

VARIANT = Variant(
    name="oft",
    config=OFT,
    family="orthogonal",
    init=init,
    apply=apply,
    prepare=prepare,
    weight=weight,
    project=project,
    leaves={"R": "d_in/b pairs | 1 pairs", "_neumann?": "terms", "_coft?": ""},
    peft=(_PEFT, _PEFT_NEUMANN),
    trials={
        "oft": Trial(lr=3e-3, peft=("OFTConfig", {"use_cayley_neumann": False})),
        "oft-neumann": Trial({"neumann_terms": 5}, lr=3e-3, peft=("OFTConfig", {})),
    },
    stacks=True,
)
