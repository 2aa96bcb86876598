"""BOFT: trained butterflies of small rotations on the input, and a gain for each output.

    W' = diag(s) W M_0ᵀ ... M_(m-1)ᵀ,   M_i = P_i blockdiag(Q) P_iᵀ,   Q = (I - S) (I + S)⁻¹

Each of the m factors rotates blocks of b inputs; from factor to factor, the permutation P_i gathers
a block from groups that lie twice as far apart. S is skew-symmetric.

*Identity at the start because* S = 0 and s = 1.

Asks of W: ``linear`` only. No matrix of d_in x d_in is built: permutations are transposed views.

References:
    https://arxiv.org/abs/2311.06243, eq. 4. Code: huggingface/peft ``tuners/boft/layer.py``.

Deviations: PEFT stores all entries of a matrix R, of which ``(R - Rᵀ) / 2`` acts; we store the
upper triangle of that. Without its CUDA extension PEFT uses one factor, whatever the config says;
we read those that a checkpoint holds, and write one alone. Its ``boft_dropout`` is read and left
out, with the numbers of evaluation. The usual block size is 4 with one factor; the learning rate is
that of OFT.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Generator, Tensor

from lora_func.checks import check_count
from lora_func.configs import LinearConfig
from lora_func.numerics import add_scaled, along_rows, at_least_float32, cayley, rotate_blocks, skew
from lora_func.variant import (
    PeftFormat,
    PeftLeaf,
    Trial,
    Variant,
    differs_on_convolution,
    prepared,
)
from lora_func.weights import Weight, bias_of, dense, linear


@dataclass(frozen=True, kw_only=True)
class BOFT(LinearConfig):
    """Orthogonal butterfly fine-tuning.

    Attributes:
        block_size: Side of a block; divides d_in, and is even for several factors.
        factors: The number of factors; ``block_size 2^(factors - 1)`` divides d_in.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(8, 3)), lf.BOFT(factors=2))
        >>> {key: tuple(leaf.shape) for key, leaf in params.items()}
        {'0.boft.R': (2, 2, 6), '0.boft.s': (3,)}
    """

    block_size: int = 4
    factors: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("block_size", self.block_size, least=2)
        check_count("factors", self.factors)
        if self.factors > 1 and self.block_size % 2:
            raise ValueError(f"block_size: got {self.block_size}; several factors need an even one")


def init(W: Weight, cfg: BOFT, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Start without rotation or scaling.

    Returns:
        R (factors, d_in / b, b (b - 1) / 2), the strict upper triangles of S, row by row; s
        (d_out,).

    Raises:
        ValueError: If the blocks of the last factor do not divide d_in.
    """
    (d_out, d_in), b, m = W.shape, cfg.block_size, cfg.factors
    if d_in % (b * 2 ** (m - 1)):
        raise ValueError(
            f"block_size = {b} with factors = {m} asks for a multiple of {b * 2 ** (m - 1)}, and "
            f"d_in is {d_in}; choose smaller ones"
        )
    return {"R": torch.zeros(m, d_in // b, b * (b - 1) // 2), "s": torch.ones(d_out)}


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Compute ``Q - I`` of all blocks, and ``s - 1``.

    Returns:
        turns (factors, blocks, b, b); more (d_out,).
    """
    S = at_least_float32(skew(params["R"]))
    return {"turns": cayley(-S).to(dtype), "more": (params["s"] - 1).to(dtype)}


def _turned(x: Tensor, turn: Tensor, i: int) -> Tensor:
    """Multiply rows x (..., d_in) by ``P_i (I + E) P_iᵀ``, with E (blocks, b, b) or a stack."""
    if not i:
        return x + rotate_blocks(x, turn)
    half, far = turn.shape[-1] // 2, 2**i
    sizes: dict[str, int] = {"far": far, "two": 2, "half": half}
    near: Tensor = rearrange(x, "... (s two far half) -> ... (s far two half)", **sizes)
    change: Tensor = rotate_blocks(near, turn)
    return x + rearrange(change, "... (s far two half) -> ... (s two far half)", **sizes)


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Rotate the input, by the last factor first, and scale what the weight makes of it.

    Returns:
        Shape (..., d_out).
    """
    if "turns" not in params:
        params = prepared(prepare, params, W, x.dtype)
    turns = params["turns"].to(x.dtype)
    for i in reversed(range(turns.shape[-4])):
        x = _turned(x, turns.select(-4, i), i)
    y, b = linear(x, W), bias_of(W)
    if b is None:
        return add_scaled(y, params["more"])
    return torch.addcmul(y, along_rows(params["more"]).to(y.dtype), y - b.to(y.dtype))


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``diag(s) W M_0ᵀ ... M_(m-1)ᵀ``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    own = prepare(params, (0, 0), W.dtype)
    for i in range(own["turns"].shape[-4]):
        W = _turned(W, own["turns"].select(-4, i).mT, i)
    return W + own["more"].unsqueeze(-1) * W


def _peft_settings(leaves: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
    factors, blocks, _ = leaves["R"].shape
    size = {"boft_block_size": shape[1] // blocks, "boft_block_num": 0}
    return {**size, "boft_n_butterfly_factor": factors}


def _upper(R: Tensor, config: Mapping[str, Any]) -> Tensor:
    b = R.shape[-1]
    rows, columns = torch.triu_indices(b, b, 1)
    return (R - R.mT)[..., rows, columns] / 2


_PEFT = PeftFormat(
    "BOFT",
    leaves={
        "R": PeftLeaf("boft_R", skew, _upper),
        "s": PeftLeaf("boft_s", lambda s: s[:, None], lambda s, _: s.flatten()),
    },
    settings=_peft_settings,
    holds=lambda leaves: leaves["R"].shape[-3] == 1,
    defaults={"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1},
    ignored=("boft_dropout", "init_weights"),
)
_PEFT_CONVOLUTION = _PEFT._replace(
    leaves={
        **_PEFT.leaves,
        "s": PeftLeaf("boft_s", lambda s: s[None], lambda s, _: s.flatten()),
    },
    layers=("Conv2d",),
    refuses=differs_on_convolution,
)

VARIANT = Variant(
    name="boft",
    config=BOFT,
    family="orthogonal",
    init=init,
    apply=apply,
    prepare=prepare,
    weight=weight,
    leaves={"R": "factors blocks upper", "s": "d_out"},
    peft=(_PEFT, _PEFT_CONVOLUTION),
    trials={
        "boft": Trial(lr=3e-3, peft=("BOFTConfig", {"boft_block_size": 4})),
        "boft-factors": Trial({"factors": 3}, lr=3e-3),
    },
    stacks=True,
)
