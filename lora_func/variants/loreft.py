"""LoReFT: a trained edit of a layer's outputs inside of a trained subspace.

    y' = y + (S y + b - Q y) Q,   y = W x + bias,   Q = orth(R) with orthonormal rows

*Identity at the start because* S begins as Q, b = 0, and S - Q is taken as the change of S less
that of Q since then, both exactly zero.

Asks of W: ``linear`` only. The edit adds a bias, also to a layer without one: ``merge`` writes it,
``attach`` has no place for it.

References:
    https://arxiv.org/abs/2404.03592, eq. 2. Code: stanfordnlp/pyreft ``pyreft/interventions.py``.

Deviations: paper and code edit the hidden states of some layers at some positions, the first and
the last tokens; as an adapter of a layer it edits its outputs at all positions, of which the layers
that write to the residual stream come nearest. The code draws S at random, which is no identity,
and keeps S in half precision. Q = L⁻¹ R with R Rᵀ = L Lᵀ; the code's map onto orthonormal rows is
torch's, which gives the same subspaces. The usual rank is 4; the learning rate is about 1e-3.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.configs import RankConfig
from lora_func.numerics import along_rows, at_least_float32, check_rank, without_autocast
from lora_func.variant import Trial, Variant, prepared
from lora_func.weights import Weight, dense, linear

Leaves = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LoReFT(RankConfig):
    """Low-rank linear subspace representation fine-tuning, on the outputs of layers.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 6)), lf.LoReFT(r=2))
        >>> {key: tuple(leaf.shape) for key, leaf in lf.partition(params)[0].items()}
        {'0.loreft.R': (2, 6), '0.loreft.S': (2, 6), '0.loreft.b': (2,)}
    """

    r: int = 4


def init(W: Weight, cfg: LoReFT, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw orthonormal rows; the target of the edit is what is there already.

    Returns:
        R and S (r, d_out), b (r,), and the constants _R0 and _S0, which are R and S.

    Raises:
        ValueError: If r exceeds d_out.
    """
    d_out, _ = W.shape
    check_rank(cfg.r, (d_out, d_out))
    R = _orthonormal(torch.randn(cfg.r, d_out, generator=generator, dtype=torch.float32))
    start = {"R": R, "S": R.clone(), "b": torch.zeros(cfg.r)}
    return {**start, "_R0": R.clone(), "_S0": R.clone()}


def _orthonormal(R: Tensor) -> Tensor:
    """Rows that span the same space and are orthonormal, in float32 or better."""
    R = at_least_float32(R)
    with without_autocast(R):
        L = torch.linalg.cholesky_ex(R @ R.mT).L
        rows: Tensor = torch.linalg.solve_triangular(L, R, upper=False)
    return rows


def _edit(params: Leaves) -> tuple[Tensor, Tensor]:
    """S - Q and Q, shapes (r, d_out)."""
    moved = params["S"] - params["_S0"]
    Q, Q0 = _orthonormal(torch.stack([params["R"], params["_R0"]])).unbind(0)
    return moved.to(Q.dtype) - (Q - Q0), Q


def prepare(params: Leaves, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Make the rows orthonormal.

    Returns:
        edit and Q (r, d_out).
    """
    edit, Q = _edit(params)
    return {"edit": edit.to(dtype), "Q": Q.to(dtype)}


def apply(W: Weight, params: Leaves, x: Tensor) -> Tensor:
    """Compute ``y + (y (S - Q)ᵀ + b) Q`` of ``y = linear(x, W)``.

    Returns:
        Shape (..., d_out).
    """
    if "edit" not in params:
        params = prepared(prepare, params, W, x.dtype)
    y = linear(x, W)
    edit, Q, b = (params[name].to(y.dtype) for name in ("edit", "Q", "b"))
    added: Tensor = (y @ edit.mT + along_rows(b)) @ Q
    return y + added


def weight(W: Weight, params: Leaves) -> Tensor:
    """Compute ``W + Qᵀ (S - Q) W``.

    Returns:
        Shape (d_out, d_in).
    """
    W, (edit, Q) = dense(W), _edit(params)
    return W + (Q.mT @ (edit @ W.to(Q.dtype))).to(W.dtype)


def bias(b: Tensor | None, params: Leaves) -> Tensor:
    """Compute ``bias + Qᵀ ((S - Q) bias + b)``.

    Returns:
        Shape (d_out,).
    """
    edit, Q = _edit(params)
    own = params["b"].to(Q.dtype)
    if b is None:
        return own @ Q
    return b + ((b.to(Q.dtype) @ edit.mT + own) @ Q).to(b.dtype)


VARIANT = Variant(
    name="loreft",
    config=LoReFT,
    family="multiplicative",
    init=init,
    apply=apply,
    prepare=prepare,
    casts=("b",),
    weight=weight,
    bias=bias,
    leaves={
        **dict.fromkeys(("R", "S", "_R0", "_S0"), "r d_out"),
        "b": "r",
    },
    trials={"loreft": Trial({"r": 4}, lr=4e-3)},
    stacks=True,
)
