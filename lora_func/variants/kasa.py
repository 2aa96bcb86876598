"""KaSA: LoRA with trained singular values, on a weight without its smallest singular components.

    W' = W - T + s B diag(d) A,   T = the r smallest singular components of W;   s = alpha / r

*No identity at the start*: B = 0, and T is gone. On a layer of width 256, with r = 8, the outputs
change by one per cent; the narrower the layer, the more.

Asks of W: the dense weight at init; ``linear`` only afterwards.

References:
    https://arxiv.org/abs/2412.06071, eq. 4-11. Code: juyongjiang/KaSA, huggingface/peft
    ``tuners/lora/variants.py``.

Deviations: paper and codes write W - T into the base weight; here the base stays, and T is kept as
a constant in two factors. The auxiliary loss of the paper is ``auxiliary_loss``, a function of the
adapter, which a training loop adds; PEFT sums it over layers, and so do we. Rank, scale and
learning rate are those of LoRA.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.configs import LowRankConfig
from lora_func.numerics import (
    DROPOUT,
    at_least_float32,
    dropout_leaf,
    kaiming_uniform,
    low_rank_norm,
    scaled,
    svd,
)
from lora_func.variant import PeftLeaf, Trial, Variant, prepared
from lora_func.variants._low_rank import LOW_RANK, PEFT_EXPORTS, PEFT_LORA, add_prepared
from lora_func.variants.lora import from_factors
from lora_func.weights import Affine, Weight, dense


@dataclass(frozen=True, kw_only=True)
class KaSA(LowRankConfig):
    """Knowledge-aware singular-value adaptation.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.KaSA(r=2))
        >>> {key: tuple(leaf.shape) for key, leaf in lf.partition(params)[0].items()}
        {'0.kasa.A': (2, 4), '0.kasa.B': (3, 2), '0.kasa.d': (2,)}
    """


def init(W: Weight, cfg: KaSA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw A and d, leave B at zero, and find the smallest singular components.

    Returns:
        A (r, d_in), B (d_out, r), d (r,), _T_in (r, d_in), _T_out (d_out, r), _scale (); _dropout
        () if there is any.

    Raises:
        ValueError: If r leaves no singular component.
    """
    d_out, d_in = W.shape
    return {
        "A": kaiming_uniform(cfg.r, d_in, generator),
        "B": torch.zeros(d_out, cfg.r),
        "d": torch.randn(cfg.r, generator=generator, dtype=torch.float32),
        **_tail(dense(W), cfg.r),
        "_scale": torch.tensor(cfg.scale, dtype=torch.float64),
        **dropout_leaf(cfg.dropout),
    }


def _tail(W: Tensor, r: int) -> dict[str, Tensor]:
    """The factors of the r smallest singular components."""
    whole = min(W.shape)
    if r >= whole:
        raise ValueError(f"r = {r} leaves none of the {whole} singular components of the weight")
    U, S, Vh = svd(W, whole)
    return {"_T_in": Vh[-r:].clone(), "_T_out": U[:, -r:] * S[-r:]}


def _up(params: Mapping[str, Tensor]) -> Tensor:
    """``s B diag(d)``, shape (d_out, r)."""
    return scaled(params["B"] * params["d"].unsqueeze(-2), params["_scale"])


def low_rank(params: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Give the factors of the trained term and of what is removed.

    Returns:
        Two pairs, shapes (..., r, d_in) and (..., d_out, r).
    """
    return [(params["A"], _up(params)), (params["_T_in"], -params["_T_out"])]


def _factors(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The factors of the whole change, of rank 2r."""
    A, B = zip(*low_rank(params), strict=True)
    return torch.cat(A, -2), torch.cat(B, -1)


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Join the factors; with dropout the trained ones stay apart.

    Returns:
        down and up; with dropout also dropped_down and dropped_up.
    """
    if DROPOUT not in params:
        down, up = _factors(params)
        return {"down": down.to(dtype), "up": up.to(dtype)}
    trained, removed = low_rank(params)
    names = ("dropped_down", "dropped_up", "down", "up")
    return {n: t.to(dtype) for n, t in zip(names, (*trained, *removed), strict=True)}


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W) + x ([s B diag(d), -T_out] [A; T_in])ᵀ``, as a LoRA of rank 2r.

    Dropout takes from the trained term alone.

    Returns:
        Shape (..., d_out).
    """
    if "up" not in params:
        params = prepared(prepare, params, W, x.dtype)
    return add_prepared(W, params, x)


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W - T + s B diag(d) A``.

    Returns:
        Shape (d_out, d_in).
    """
    W, (down, up) = dense(W), _factors(params)
    return W + (up @ down).to(W.dtype)


def delta_norm(params: Mapping[str, Tensor], shape: tuple[int, int] | None) -> Tensor:
    """Compute the norm of ``s B diag(d) A - T``.

    Returns:
        Shape ().
    """
    down, up = _factors(params)
    return low_rank_norm(down, up, up.new_ones(()))


def auxiliary_loss(params: Mapping[str, Tensor], beta: float = 1e-4, gamma: float = 1e-3) -> Tensor:
    """Compute the paper's penalty on singular values and on factors that are not orthogonal.

    ``Σ over sites of beta ‖d‖² + gamma (‖Bᵀ B - I‖ + ‖A Aᵀ - I‖)``, in float32 or better.

    Args:
        params: An adapter, or a stack; other variants in it do not count.
        beta: How much the singular values weigh.
        gamma: How much the factors weigh.

    Returns:
        Shape (), or (K,) of a stack.

    Raises:
        ValueError: If no site is adapted by KaSA.

    Examples:
        >>> import torch, lora_func as lf
        >>> from lora_func.variants.kasa import auxiliary_loss
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.KaSA(r=2))
        >>> auxiliary_loss(params).requires_grad
        True
    """
    ends = f".{VARIANT.name}.d"
    sites = [key.removesuffix("d") for key in params if key.endswith(ends)]
    if not sites:
        raise ValueError("params: no site is adapted by KaSA")
    total: Tensor = torch.zeros(())
    for site in sites:
        A, B, d = (at_least_float32(params[site + leaf]) for leaf in "ABd")
        eye = torch.eye(d.shape[-1], dtype=d.dtype, device=d.device)
        apart = torch.stack([B.mT @ B - eye, A @ A.mT - eye]).norm(dim=(-2, -1)).sum(0)
        total = total.to(d) + beta * d.square().sum(-1) + gamma * apart
    return total


def _peft_constants(
    config: Mapping[str, object], leaves: Mapping[str, Tensor], W: Affine
) -> dict[str, Tensor]:
    """PEFT removes the components from the base each time that it loads a checkpoint."""
    constants = PEFT_LORA.constants(config, leaves, W)
    return {**_tail(dense(W).to(leaves["A"].dtype), leaves["A"].shape[-2]), **constants}


_PEFT = PEFT_LORA._replace(
    leaves={**PEFT_LORA.leaves, "d": PeftLeaf("lora_diag")},
    settings=lambda leaves, shape: {
        **PEFT_LORA.settings(leaves, shape),
        "kasa_config.beta": 1e-4,
        "kasa_config.gamma": 1e-3,
    },
    constants=_peft_constants,
    means=lambda config, path: "kasa_config.beta" in config,
    ignored=(*PEFT_LORA.ignored, "kasa_config.beta", "kasa_config.gamma"),
    layers=("Linear",),
)


def _as_lora(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same change as a LoRA of rank 2r, for PEFT."""
    kept = {DROPOUT: leaves[DROPOUT]} if DROPOUT in leaves else {}
    return {**from_factors(*_factors(leaves)), **kept}


VARIANT = Variant(
    name="kasa",
    config=KaSA,
    family="SVD",
    init=init,
    apply=apply,
    prepare=prepare,
    weight=weight,
    delta_norm=delta_norm,
    leaves={**LOW_RANK, "d": "r", "_T_in": "r d_in", "_T_out": "d_out r"},
    low_rank=low_rank,
    peft=(_PEFT, *(one._replace(convert=_as_lora) for one in PEFT_EXPORTS)),
    trials={
        "kasa": Trial(start="elsewhere", peft=("LoraConfig", {"r": 8, "kasa_config": {}})),
    },
    pads=True,
    stacks=True,
    products_only=True,
)
