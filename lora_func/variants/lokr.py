"""LoKr: the Kronecker product of two small trained matrices.

    W' = W + s w1 ⊗ w2,   s = alpha / r;   w1 (a, p), w2 (b, q), d_out = a b, d_in = p q

*Identity at the start because* the factor that ``zero`` names is zero, and so is the added term.

Asks of W: ``linear`` only. x is viewed as p x q, and each side is multiplied by its factor, which
is stored whole, or as a product of rank r where that is smaller.

References:
    LyCORIS, https://arxiv.org/abs/2309.14859, section 3.2. Code: KohakuBlueleaf/LyCORIS
    ``modules/lokr.py``, huggingface/peft ``tuners/lokr/layer.py``.

Deviations: LyCORIS starts with w2 at zero, PEFT with w1; ``zero`` chooses. LyCORIS scales by 1 if
both factors are whole, PEFT by alpha / r always; we follow PEFT. PEFT reads a ``decompose_factor``
of 0 as 1; we refuse it. PEFT's product on a Conv1d with a whole w2 mixes the axes of the kernel; it
is not read. Its ``rank_dropout`` and ``module_dropout`` are read and left out, with the
numbers of evaluation. The usual rank is 8, the scale 1, the learning rate that of LoRA or higher.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from einops import einsum
from torch import Generator, Tensor

from lora_func.checks import check_choice, check_count, check_flag
from lora_func.configs import ScaledConfig
from lora_func.numerics import kaiming_uniform, scaled, two_divisors
from lora_func.variant import (
    PeftFormat,
    PeftLeaf,
    Trial,
    Variant,
    differs_in_padding,
    prepared,
    rank_of,
)
from lora_func.variants._low_rank import alpha_of, scale_like
from lora_func.weights import Weight, dense, linear

Leaves = Mapping[str, Tensor]
COLUMNS, ROWS = "k n p q, k b q -> k n p b", "k n p q, k a p -> k n a q"


@dataclass(frozen=True, kw_only=True)
class LoKr(ScaledConfig):
    """Low-rank Kronecker product.

    Attributes:
        decompose_factor: The smaller side of both factorisations, where it divides; None for the
            divisors closest to √d.
        decompose_both: Whether w1 too may be a product of rank r; else only w2.
        zero: The factor that starts at zero.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(12, 6)), lf.LoKr(r=1))
        >>> {key.rpartition(".")[2]: tuple(leaf.shape) for key, leaf in params.items()}
        {'w1': (2, 3), 'w2_a': (3, 1), 'w2_b': (1, 4), '_scale': ()}
    """

    usual_scale: ClassVar[float] = 1.0
    decompose_factor: int | None = None
    decompose_both: bool = False
    zero: Literal["w1", "w2"] = "w1"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("zero", self.zero, ("w1", "w2"))
        check_flag("decompose_both", self.decompose_both)
        if self.decompose_factor is not None:
            check_count("decompose_factor", self.decompose_factor)


def init(W: Weight, cfg: LoKr, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw one factor, leave the other at zero.

    Returns:
        w1 (a, p), or w1_a (a, r) and w1_b (r, p); w2 (b, q), or w2_a (b, r) and w2_b (r, q);
        _scale ().
    """
    d_out, d_in = W.shape
    (a, b), (p, q) = (two_divisors(d, cfg.decompose_factor) for d in (d_out, d_in))
    splits_first = cfg.decompose_both and cfg.r < max(a, p) / 2
    first = _factor("w1", (a, p), cfg.r if splits_first else None, cfg.zero == "w1", generator)
    second_rank = cfg.r if cfg.r < max(b, q) / 2 else None
    second = _factor("w2", (b, q), second_rank, cfg.zero == "w2", generator)
    return {**first, **second, "_scale": torch.tensor(cfg.scale, dtype=torch.float64)}


def _factor(
    name: str, shape: tuple[int, int], r: int | None, is_zero: bool, generator: Generator
) -> dict[str, Tensor]:
    """A factor, whole or of rank r; of a product w1_a or w2_b is the zero, as in the references."""
    rows, columns = shape
    if r is None:
        drawn = kaiming_uniform(rows, columns, generator)
        return {name: torch.zeros(shape) if is_zero else drawn}
    parts = {
        f"{name}_a": kaiming_uniform(rows, r, generator),
        f"{name}_b": kaiming_uniform(r, columns, generator),
    }
    if is_zero:
        parts["w1_a" if name == "w1" else "w2_b"].zero_()
    return parts


def _whole(params: Leaves, name: str) -> Tensor:
    return params[name] if name in params else params[f"{name}_a"] @ params[f"{name}_b"]


def prepare(params: Leaves, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Compute ``s w1``.

    Returns:
        first, shape (a, p).
    """
    return {"first": scaled(_whole(params, "w1"), params["_scale"]).to(dtype)}


def apply(W: Weight, params: Leaves, x: Tensor) -> Tensor:
    """Compute ``linear(x, W) + s (w1 ⊗ w2) x`` from both sides of x as a p x q matrix.

    Returns:
        Shape (..., d_out).
    """
    if "first" not in params:
        params = prepared(prepare, params, W, x.dtype)
    y = linear(x, W)
    if params["first"].ndim == 2:  # one adapter is a stack of one
        params = {name: leaf[None] for name, leaf in params.items()}
    first = params["first"].to(x.dtype)
    grid = x.reshape(len(first), -1, first.shape[-1], x.shape[-1] // first.shape[-1])
    return y + _kronecker(grid, first, params).reshape(y.shape).to(y.dtype)


def _kronecker(grid: Tensor, first: Tensor, params: Leaves) -> Tensor:
    """Multiply a grid (K, n, p, q) by both factors, to (K, n, a, b)."""
    if "w2" not in params:
        down, up = params["w2_b"].to(grid.dtype), params["w2_a"].to(grid.dtype)
        grid = einsum(einsum(grid, down, COLUMNS), first, ROWS)
        return einsum(grid, up, COLUMNS)
    second = params["w2"].to(grid.dtype)
    (b, q), (a, p) = second.shape[-2:], first.shape[-2:]
    if p * q * b + a * p * b <= a * p * q + a * q * b:
        return einsum(einsum(grid, second, COLUMNS), first, ROWS)
    return einsum(einsum(grid, first, ROWS), second, COLUMNS)


def weight(W: Weight, params: Leaves) -> Tensor:
    """Compute ``W + s w1 ⊗ w2``.

    Returns:
        Shape (d_out, d_in).
    """
    W, first = dense(W), scaled(_whole(params, "w1"), params["_scale"])
    change = einsum(first, _whole(params, "w2"), "... a p, ... b q -> ... a b p q")
    return W + change.flatten(-2).flatten(-3, -2).to(W.dtype)


def delta_norm(params: Leaves, shape: tuple[int, int] | None) -> Tensor:
    """Compute the norm of the change, the product of those of its factors.

    Returns:
        Shape ().
    """
    return params["_scale"].abs() * _norm(params, "w1") * _norm(params, "w2")


def _norm(params: Leaves, name: str) -> Tensor:
    return _whole(params, name).double().square().sum((-2, -1)).sqrt()


def _peft_settings(leaves: Leaves, shape: tuple[int, int]) -> dict[str, Any]:
    (a, p), rank = _whole(leaves, "w1").shape[-2:], rank_of(VARIANT, leaves)
    r = rank or -(-max(shape[0] // a, shape[1] // p) // 2)  # from where PEFT keeps w2 whole
    factors = frozenset(
        factor
        for factor in (-1, *range(1, max(a, p) + 1))
        if [two_divisors(d, None if factor < 0 else factor)[0] for d in shape] == [a, p]
    )
    if not factors:
        raise ValueError(f"its w1 is {a} x {p}, which no decompose_factor of PEFT gives")
    both = frozenset({"w1_a" in leaves, "w1_a" in leaves or r >= max(a, p) / 2})
    settings = {"r": r, "decompose_factor": factors, "decompose_both": both}
    return settings | {"alpha": alpha_of(leaves["_scale"], r)}


def _format(names: tuple[str, ...]) -> PeftFormat:
    return PeftFormat(
        "LOKR",
        leaves={
            name: PeftLeaf(f"lokr_{name}", layout="kernel" if name == "w2" else "plain")
            for name in names
        },
        settings=_peft_settings,
        constants=lambda config, leaves, W: scale_like(
            config["alpha"] / config["r"], next(iter(leaves.values()))
        ),
        holds=lambda leaves: leaves.keys() >= {*names},
        patterns={"r": "rank_pattern", "alpha": "alpha_pattern"},
        defaults={"r": 8, "alpha": 8, "decompose_factor": -1, "decompose_both": False},
        ignored=(
            *("rank_dropout", "module_dropout", "rank_dropout_scale"),
            *("init_weights", "use_effective_conv2d"),
        ),
        lowers_rank=True,
        by_channels=True,
        layers=("Linear", "Conv2d") if "w2" in names else ("Linear", "Conv1d", "Conv2d"),
        refuses=differs_in_padding,
    )


VARIANT = Variant(
    name="lokr",
    config=LoKr,
    family="low-rank",
    init=init,
    apply=apply,
    prepare=prepare,
    casts=("w2", "w2_a", "w2_b"),
    weight=weight,
    delta_norm=delta_norm,
    leaves={
        "w1?": "d_out/b d_in/q",
        "w1_a?": "d_out/b r",
        "w1_b?": "r d_in/q",
        "w2?": "b q",
        "w2_a?": "b r",
        "w2_b?": "r q",
        "_scale": "",
    },
    peft=tuple(
        _format((*first, *second))
        for first in (("w1",), ("w1_a", "w1_b"))
        for second in (("w2",), ("w2_a", "w2_b"))
    ),
    trials={
        "lokr": Trial(lr=3e-3, peft=("LoKrConfig", {"r": 8})),
        "lokr-both": Trial({"decompose_factor": 4, "decompose_both": True}, lr=3e-3),
    },
    pads=True,
    stacks=True,
)
