"""PiSSA: LoRA that starts from the principal singular directions of the weight.

    W' = W + s (B A - B0 A0),   s B0 A0 = the r largest singular components of W

*Identity at the start because* the difference is taken as (B - B0) A + B0 (A - A0), both terms of
which are exactly zero at A0, B0 in every dtype.

Asks of W: ``dense`` at init, ``linear`` after that.

References:
    https://arxiv.org/abs/2404.02948, eq. 2-5. Code: MuLabPKU/PiSSA, huggingface/peft
    ``tuners/lora/layer.py`` (``pissa_init``).

Deviations: paper and codes write the residual W - s B0 A0 into the base weight, which is then off
by rounding; we keep A0 and B0 as constants and the base as it is. S is divided by s before the
factors are made, as in PEFT, so that the start does not depend on alpha. On a quantised base the
residual is not quantised again (no QPiSSA). Weight decay pulls W' towards W without its principal
part, as in PEFT. Dropout takes from the trained product alone, as in PEFT: in training mode the
start is then the base on average.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from lora_func.checks import check_count
from lora_func.configs import LowRankConfig
from lora_func.numerics import (
    DROPOUT,
    dropout_leaf,
    low_rank_difference,
    low_rank_norm,
    scaled,
    svd,
)
from lora_func.variant import Trial, Variant, prepared
from lora_func.variants._low_rank import LOW_RANK, PEFT_FORMATS, PEFT_LORA, add_prepared
from lora_func.weights import Affine, Weight, dense


@dataclass(frozen=True, kw_only=True)
class PiSSA(LowRankConfig):
    """Principal singular values and vectors adaptation. The authors train with ``alpha = r``.

    Attributes:
        niter: None for the exact singular value decomposition; an integer for the randomised one
            with that many power iterations, much faster on wide layers.

    Example:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.PiSSA(r=2))
        >>> [key for key, leaf in params.items() if leaf.requires_grad]
        ['0.pissa.A', '0.pissa.B']
    """

    niter: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.niter is not None:
            check_count("niter", self.niter, least=0)


def init(W: Weight, cfg: PiSSA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Split the principal part of W evenly between the factors.

    Returns:
        A and _A0 (r, d_in), B and _B0 (d_out, r), _scale (); _dropout () if there is any.
    """
    A, B = _start(dense(W), cfg.r, cfg.scale, cfg.niter, generator)
    scale = torch.tensor(cfg.scale, dtype=torch.float64)
    copies = {"_A0": A.clone(), "_B0": B.clone()}
    return {"A": A, "B": B, **copies, "_scale": scale, **dropout_leaf(cfg.dropout)}


def _start(
    W: Tensor,
    r: int,
    scale: Tensor | float,
    niter: int | None = None,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A and B of the r largest singular components of W / s."""
    U, S, Vh = svd(W, r, niter, generator)
    root = (S / scale).sqrt()
    return root[:, None] * Vh, U * root


def _factors(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    return low_rank_difference(params["A"], params["B"], params["_A0"], params["_B0"])


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Make the factors of the difference; with dropout those of the start and of the trained term.

    Returns:
        down and up; with dropout also dropped_down and dropped_up.
    """
    scale = params["_scale"]
    if DROPOUT not in params:
        down, up = _factors(params)
        return {"down": down.to(dtype), "up": scaled(up, scale).to(dtype)}
    return {
        "down": params["_A0"].to(dtype),
        "up": scaled(-params["_B0"], scale).to(dtype),
        "dropped_down": params["A"].to(dtype),
        "dropped_up": scaled(params["B"], scale).to(dtype),
    }


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W) + s x (B A - B0 A0)ᵀ``, as a LoRA of rank 2r.

    With dropout it is ``linear(x, W) - s x (B0 A0)ᵀ + s drop(x) (B A)ᵀ``.

    Returns:
        Shape (..., d_out).
    """
    if "up" not in params:
        params = prepared(prepare, params, W, x.dtype)
    return add_prepared(W, params, x)


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W + s (B A - B0 A0)``.

    Returns:
        Shape (d_out, d_in).
    """
    W, (down, up) = dense(W), _factors(params)
    return W + (scaled(up, params["_scale"]) @ down).to(W.dtype)


def delta_norm(params: Mapping[str, Tensor], shape: tuple[int, int] | None) -> Tensor:
    """Compute the norm of ``s (B A - B0 A0)``.

    Returns:
        Shape ().
    """
    return low_rank_norm(*_factors(params), params["_scale"])


def low_rank(params: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Give the factors of the trained and of the initial product, the scale in B.

    Returns:
        Two pairs, shapes (..., r, d_in) and (..., d_out, r).
    """
    B, B0 = (scaled(params[leaf], params["_scale"]) for leaf in ("B", "_B0"))
    return [(params["A"], B), (params["_A0"], -B0)]


def _as_lora(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same change as a LoRA of rank 2r, for PEFT."""
    A = torch.cat([leaves["A"], leaves["_A0"]])
    B = torch.cat([leaves["B"], -leaves["_B0"]], 1)
    kept = {leaf: leaves[leaf] for leaf in ("_scale", DROPOUT) if leaf in leaves}
    return {"A": A, "B": B, **kept}


def _peft_constants(
    config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Affine
) -> dict[str, Tensor]:
    """PEFT subtracts the start from the base each time that it loads a checkpoint."""
    constants = PEFT_LORA.constants(config, leaves, W)
    A0, B0 = _start(dense(W).to(leaves["A"].dtype), leaves["A"].shape[-2], constants["_scale"])
    return {"_A0": A0, "_B0": B0, **constants}


_PEFT_START = PEFT_LORA._replace(
    constants=_peft_constants,
    means=lambda config, path: config.get("init_lora_weights") == "pissa",
    holds=lambda leaves: False,
    inert={
        **PEFT_LORA.inert,
        "init_lora_weights": (*PEFT_LORA.inert["init_lora_weights"], "pissa"),
    },
)

VARIANT = Variant(
    name="pissa",
    config=PiSSA,
    family="SVD",
    init=init,
    apply=apply,
    prepare=prepare,
    weight=weight,
    delta_norm=delta_norm,
    leaves={**LOW_RANK, "_A0": "r d_in", "_B0": "d_out r"},
    low_rank=low_rank,
    peft=(*(one._replace(convert=_as_lora) for one in PEFT_FORMATS), _PEFT_START),
    trials={
        "pissa": Trial(lr=3e-4, peft=("LoraConfig", {"r": 8, "init_lora_weights": "pissa"})),
        "pissa-fast": Trial(
            {"niter": 4},
            lr=3e-4,
            peft=("LoraConfig", {"r": 8, "init_lora_weights": "pissa_niter_4"}),
        ),
    },
    pads=True,
    stacks=True,
    products_only=True,
)
