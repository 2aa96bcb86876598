"""SGain: trained gains on singular values, which can grow and shrink but never turn round.

    W' = W + U diag(S φ) Vᵀ,   φ = elu(c g),   so S becomes S (1 + elu(c g)) > 0

With ``k`` a trained k-dimensional core is added: U (diag(S φ) + c B A) Vᵀ.

*Identity at the start because* elu(0) = 0, and B = 0.

Asks of W: the dense weight at init; ``linear`` only afterwards. Since UᵀW = S Vᵀ, the outputs alone
are enough, ``y + ((y U) φ) Uᵀ``, or the inputs alone; the smaller side is kept, without S.

References:
    The row "gain" and the core "dplr" of wassname/lora-lite, ``variants/antipasto.py``. No paper.

Deviations: the code takes the directions out of the weight and adds them again, which is the base
up to rounding alone; here the change alone is added. It clamps gains in the forward pass for
``suppress_only``, where a gain beyond the bound gets no gradient and is stuck; here ``project``
bounds them after a step. Its damping of the second moments is absolute; here it is relative to
their mean. The usual rank is 256; the learning rate is about 1e-2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lora_func.checks import check_choice, check_count, check_number
from lora_func.numerics import (
    SINGULAR,
    Moments,
    along_rows,
    at_least_float32,
    join_moments,
    observe_moments,
    without_autocast,
)
from lora_func.variant import Trial, Variant, prepared
from lora_func.variants._bases import BasisConfig, directions
from lora_func.variants._factors import views_of
from lora_func.weights import Weight, bias_of, dense, linear

Leaves = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class SGain(BasisConfig):
    """Multiplicative gains in the space of singular vectors.

    Attributes:
        coeff: The steering coefficient c, kept as the constant ``_coeff``; 0 is the base.
        suppress_only: Whether ``project`` keeps gains from amplifying: c g ≤ 0.
        side: The side whose directions are kept: "out", "in", or "auto" for the smaller one. Bases
            from data have the side "out" alone.
        k: The rank of a core between the directions; 0 for none.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 8)), lf.SGain(r=3))
        >>> {key: tuple(leaf.shape) for key, leaf in params.items()}
        {'0.sgain.gains': (3,), '0.sgain._coeff': (), '0.sgain._Vh': (3, 4)}
    """

    coeff: float = 1.0
    suppress_only: bool = False
    side: str = "auto"
    k: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("coeff", self.coeff)
        check_choice("side", self.side, ("auto", "out", "in"))
        check_count("k", self.k, least=0)
        if self.basis != "svd" and (self.k or self.side == "in"):
            raise ValueError(
                f"basis: got {self.basis!r}, which has no directions of the inputs; take "
                "basis='svd' for side='in' and for k"
            )
        for r in self.ranks:
            if self.k > r:
                raise ValueError(f"k: got {self.k}, expected at most r = {r}")

    @property
    def variant(self) -> str:
        """The name that belongs to the core."""
        return "sgain_dplr" if self.k else "sgain"


def init(
    W: Weight, cfg: SGain, generator: Generator, stats: Moments | None = None
) -> dict[str, Tensor]:
    """Take the directions; gains start at zero.

    Returns:
        gains (r,), _coeff (), _U (d_out, r) or _Vh (r, d_in); with a core both, _S (r,), A (k, r)
        and B (r, k). _suppress () if gains are bounded.
    """
    U, S, Vh = directions(W, cfg, stats)
    leaves = {"gains": torch.zeros(cfg.r), "_coeff": torch.tensor(cfg.coeff, dtype=torch.float64)}
    if cfg.suppress_only:
        leaves["_suppress"] = torch.ones(())
    if cfg.k and Vh is not None:
        A = torch.empty(cfg.k, cfg.r, dtype=torch.float32)
        A = A.uniform_(-(cfg.r**-0.5), cfg.r**-0.5, generator=generator)
        return {**leaves, "A": A, "B": torch.zeros(cfg.r, cfg.k), "_U": U, "_S": S, "_Vh": Vh}
    out = cfg.side == "out" or (cfg.side == "auto" and W.shape[0] <= W.shape[1])
    return {**leaves, **({"_U": U} if Vh is None or out else {"_Vh": Vh})}


def _phi(params: Leaves) -> Tensor:
    gains = at_least_float32(params["gains"])
    return F.elu(params["_coeff"].to(gains.dtype)[..., None] * gains)


def prepare(params: Leaves, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Compute φ.

    Returns:
        phi (r,).
    """
    return {"phi": _phi(params).to(dtype)}


def _steered(rows: Tensor, basis: Tensor, phi: Tensor, offset: Tensor | None = None) -> Tensor:
    """Scale rows (..., d) along an orthonormal basis (r, d): what is added to them."""
    h = rows @ basis.mT
    if offset is not None:
        h = h - along_rows(offset @ basis.mT)
    added: Tensor = (h * phi) @ basis
    return added


def apply(W: Weight, params: Leaves, x: Tensor) -> Tensor:
    """Compute ``y + (((y - b) U) φ) Uᵀ`` of ``y = linear(x, W)``, or scale x along V before.

    Returns:
        Shape (..., d_out).
    """
    if "phi" not in params:
        params = prepared(prepare, params, W, x.dtype)
    phi = along_rows(params["phi"]).to(x.dtype)
    if "_Vh" in params:
        return linear(x + _steered(x, params["_Vh"].to(x.dtype), phi), W)
    y, bias = linear(x, W), bias_of(W)
    offset = None if bias is None else bias.to(y.dtype)
    return y + _steered(y, params["_U"].mT.to(y.dtype), phi.to(y.dtype), offset)


def weight(W: Weight, params: Leaves) -> Tensor:
    """Compute ``W + U diag(φ) Uᵀ W``, or ``W + W V diag(φ) Vᵀ``.

    Returns:
        Shape (d_out, d_in).
    """
    W, phi = dense(W), _phi(params)
    rows = W.to(phi.dtype)
    if "_Vh" in params:
        return W + _steered(rows, params["_Vh"].to(phi.dtype), phi).to(W.dtype)
    return W + _steered(rows.mT, params["_U"].mT.to(phi.dtype), phi).mT.to(W.dtype)


def _up(params: Leaves) -> Tensor:
    """``U (diag(S φ) + c B A)``, shape (d_out, r)."""
    phi = _phi(params)
    c = params["_coeff"].to(phi.dtype)[..., None, None]
    with without_autocast(phi):
        core = c * (params["B"].to(phi.dtype) @ params["A"].to(phi.dtype))
        core = core + torch.diag_embed(phi * params["_S"].to(phi.dtype))
        return params["_U"].to(phi.dtype) @ core


def project(params: Leaves) -> dict[str, Tensor]:
    """Bring gains that amplify to zero, if they are bounded.

    Returns:
        gains, or nothing.
    """
    if "_suppress" not in params:
        return {}
    gains = params["gains"]
    amplifies = params["_coeff"].to(gains.dtype)[..., None] * gains > 0
    return {"gains": torch.where(amplifies, torch.zeros_like(gains), gains)}


_COMMON = {"gains": "r", "_coeff": "", "_suppress?": ""}

ONE_SIDED = Variant(
    name="sgain",
    config=SGain,
    family="SVD",
    init=init,
    apply=apply,
    prepare=prepare,
    weight=weight,
    observe=observe_moments,
    join=join_moments,
    project=project,
    leaves={**_COMMON, "_U?": "d_out r", "_Vh?": "r d_in"},
    trials={
        "sgain": Trial(lr=1e-2),
        "sgain-corda": Trial({"basis": "corda", "suppress_only": True}, lr=1e-2, data=True),
    },
    pads=True,
    stacks=True,
)
WITH_CORE = Variant(
    name="sgain_dplr",
    config=SGain,
    family="SVD",
    init=init,
    observe=observe_moments,
    join=join_moments,
    project=project,
    leaves={**_COMMON, "A": "k r", "B": "r k", **SINGULAR},
    trials={"sgain-dplr": Trial({"k": 8}, lr=1e-2, data=True)},
    pads=True,
    **views_of("_Vh", _up),
)
VARIANTS = (ONE_SIDED, WITH_CORE)
