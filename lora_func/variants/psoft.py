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
from lora_func.numerics import at_least_float32, cayley, dropout_leaf, skew, svd
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant
from lora_func.variants._factors import views_of
from lora_func.weights import Affine, Weight, dense


@dataclass(frozen=True, kw_only=True)
class PSOFT(DropoutConfig, RankConfig):
    """Principal subspace orthogonal fine-tuning.

    Attributes:
        gains: Whether the gains a and b are trained; without them R is a rotation.

    Examples:
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
        for r in self.ranks:
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
    return {**trained, **_factors(dense(W), cfg.r), **dropout_leaf(cfg.dropout)}


def _factors(W: Tensor, r: int, even: bool = False) -> dict[str, Tensor]:
    """The factors; S in B, or shared out evenly as in PEFT's "pissa_init"."""
    U, S, Vh = svd(W, r)
    left = S.sqrt() if even else torch.ones_like(S)
    return {"_A": left[:, None] * Vh, "_B": U * (S / left)}


def _core(params: Mapping[str, Tensor]) -> Tensor:
    """R - I, exactly 0 at the start."""
    E = cayley(at_least_float32(skew(params["K"])))
    if "a" not in params:
        return E
    a, b = params["a"].to(E.dtype), params["b"].to(E.dtype)
    gains = b.unsqueeze(-1) * a.unsqueeze(-2)
    return E * gains + torch.diag_embed(a * b - 1)


def _up(params: Mapping[str, Tensor]) -> Tensor:
    """``U diag(S) (R - I)``, shape (d_out, r)."""
    core = _core(params)
    up: Tensor = params["_B"].to(core.dtype) @ core
    return up


def _peft_constants(
    config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Affine
) -> dict[str, Tensor]:
    subspace = _factors(dense(W), config["r"], config["ab_svd_init"] == "pissa_init")
    return {**subspace, **dropout_leaf(config["psoft_dropout"])}


_NAMES = {"K": "weight", "a": "vector_a", "b": "vector_b"}


def _format(*leaves: str) -> PeftFormat:
    return PeftFormat(
        "PSOFT",
        leaves={leaf: PeftLeaf(f"psoft_R.{_NAMES[leaf]}") for leaf in leaves},
        constants=_peft_constants,
        holds=lambda leaves: False,
        defaults={"r": 32, "psoft_dropout": 0.0, "ab_svd_init": "psoft_init"},
        inert={
            "ab_svd_init": ("psoft_init", "pissa_init"),
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


_VIEWS = views_of("_A", _up)

VARIANT = Variant(
    name="psoft",
    config=PSOFT,
    family="SVD",
    init=init,
    leaves={
        "K": "upper",
        "a?": "r",
        "b?": "r",
        "_A": "r d_in",
        "_B": "d_out r",
        "_dropout?": "",
    },
    trials={"psoft": Trial({"r": 16}, lr=3e-3, peft=("PsoftConfig", {"r": 16, "psoft_alpha": 16}))},
    **_VIEWS | {"peft": (*_VIEWS["peft"], _format("K", "a", "b"), _format("K"))},
)
