"""SAblate: remove trained directions from the outputs of a layer, with a trained strength.

    W' = W - D diag(c α) Dᵀ W,   D = U Ĉ with orthonormal columns,   Ĉ = C L⁻ᵀ,   CᵀC = L Lᵀ

*Identity at the start because* α = 0.

Asks of W: the dense weight at init; ``linear`` only afterwards. The bias stays.

References:
    The row "ablate" of wassname/lora-lite, ``variants/antipasto.py``; directional ablation,
    https://arxiv.org/abs/2406.11717.

Deviations: the code starts from α = 0.05, which is no identity, and normalises one direction with
an offset of 1e-6; here columns are orthonormal to rounding. It clamps α to [0, 1] in the forward
pass, where α beyond a bound gets no gradient; here ``project`` does so after a step. In [0, 1] no
singular value of the layer grows. The usual rank is 256; the learning rate is about 1e-2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.checks import check_count, check_number
from lora_func.numerics import (
    Moments,
    along_rows,
    at_least_float32,
    join_moments,
    observe_moments,
    without_autocast,
)
from lora_func.variant import Trial, Variant, prepared
from lora_func.variants._bases import BasisConfig, directions
from lora_func.weights import Weight, bias_of, dense, linear

Leaves = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class SAblate(BasisConfig):
    """Trained ablation of directions inside of a layer's singular space.

    Attributes:
        k: How many directions are removed.
        coeff: What multiplies α, kept as the constant ``_coeff``, from 0 (the base) to 1.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(8, 4)), lf.SAblate(r=3))
        >>> {key: tuple(leaf.shape) for key, leaf in lf.partition(params)[0].items()}
        {'0.sablate.C': (3, 1), '0.sablate.alpha': (1,)}
    """

    k: int = 1
    coeff: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("k", self.k)
        check_number("coeff", self.coeff)
        if not 0 <= self.coeff <= 1:
            raise ValueError(f"coeff: got {self.coeff}, expected a number from 0 to 1")
        for r in self.ranks:
            if self.k > r:
                raise ValueError(f"k: got {self.k}, expected at most r = {r}")


def init(
    W: Weight, cfg: SAblate, generator: Generator, stats: Moments | None = None
) -> dict[str, Tensor]:
    """Take the singular directions, draw those that will be removed; the strength is zero.

    Returns:
        C (r, k), alpha (k,), _U (d_out, r), _coeff ().
    """
    U, _, _ = directions(W, cfg, stats)
    C = torch.randn(cfg.r, cfg.k, generator=generator, dtype=torch.float32) * cfg.r**-0.5
    coeff = torch.tensor(cfg.coeff, dtype=torch.float64)
    return {"C": C, "alpha": torch.zeros(cfg.k), "_U": U, "_coeff": coeff}


def _removed(params: Leaves) -> tuple[Tensor, Tensor]:
    """D, shape (d_out, k), and the strengths c α, shape (k,)."""
    C = at_least_float32(params["C"])
    with without_autocast(C):
        L = torch.linalg.cholesky_ex(C.mT @ C).L
        D = params["_U"].to(C.dtype) @ torch.linalg.solve_triangular(L, C.mT, upper=False).mT
    return D, params["_coeff"].to(C.dtype)[..., None] * params["alpha"].to(C.dtype)


def prepare(params: Leaves, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Make the directions orthonormal.

    Returns:
        D (d_out, k), strength (k,).
    """
    D, strength = _removed(params)
    return {"D": D.to(dtype), "strength": strength.to(dtype)}


def apply(W: Weight, params: Leaves, x: Tensor) -> Tensor:
    """Compute ``y - (((y - b) D) c α) Dᵀ`` of ``y = linear(x, W)``.

    Returns:
        Shape (..., d_out).
    """
    if "D" not in params:
        params = prepared(prepare, params, W, x.dtype)
    y, bias = linear(x, W), bias_of(W)
    D, strength = params["D"].to(y.dtype), along_rows(params["strength"]).to(y.dtype)
    along = y @ D
    if bias is not None:
        along = along - along_rows(bias.to(y.dtype) @ D)
    removed: Tensor = (along * strength) @ D.mT
    return y - removed


def weight(W: Weight, params: Leaves) -> Tensor:
    """Compute ``W - D diag(c α) Dᵀ W``.

    Returns:
        Shape (d_out, d_in).
    """
    W, (D, strength) = dense(W), _removed(params)
    return W - ((D * strength) @ (D.mT @ W.to(D.dtype))).to(W.dtype)


def project(params: Leaves) -> dict[str, Tensor]:
    """Bring the strengths into [0, 1].

    Returns:
        alpha.
    """
    return {"alpha": params["alpha"].clamp(0, 1)}


VARIANT = Variant(
    name="sablate",
    config=SAblate,
    family="SVD",
    init=init,
    apply=apply,
    prepare=prepare,
    weight=weight,
    observe=observe_moments,
    join=join_moments,
    project=project,
    leaves={"C": "r k", "alpha": "k", "_U": "d_out r", "_coeff": ""},
    trials={"sablate": Trial({"k": 2}, lr=1e-2)},
    pads=True,
    stacks=True,
    products_only=True,
)
