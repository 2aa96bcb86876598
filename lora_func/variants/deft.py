"""DeFT: remove a trained subspace of the outputs, and inject a trained term there; PaRa removes.

    W' = W - Q Pᵀ W + s Q R,   s = alpha / r, or 1

With "relu" Q = P and the removed part is ``P relu(P)ᵀ W``; with "qr" both are the orthonormal basis
of the columns of P.

*Identity at the start because* R = Pᵀ W / s, so that what is injected is what is removed. Both are
computed as differences from the start, ``Q (s (R - R0) - (P - P0)ᵀ W)``, which is the same and
exactly zero there. PaRa has no R and is no identity at any P.

Asks of W: the dense weight at init; ``linear`` only afterwards.

References:
    DeFT, NeurIPS 2025; PaRa, https://arxiv.org/abs/2410.04340. Code: huggingface/peft
    ``tuners/deft/layer.py``.

Deviations: PEFT lowers a rank above d_out silently; we refuse it. PEFT multiplies by Q twice, we
once, which is the same. The usual rank is 8, the learning rate that of LoRA.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from lora_func.checks import check_choice, check_flag
from lora_func.configs import LowRankConfig
from lora_func.numerics import (
    DROPOUT,
    at_least_float32,
    dropout,
    dropout_leaf,
    dropout_setting,
    scaled,
    without_autocast,
)
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant, prepared
from lora_func.variants._low_rank import alpha_of, scale_like
from lora_func.weights import Affine, Weight, bias_of, dense, linear

Leaves = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class DeFT(LowRankConfig):
    """Subspace removal and injection.

    Attributes:
        method: How P gives the projection: "relu", or "qr" for an orthogonal one.
        para: Whether to remove alone, as PaRa does; alpha and dropout then mean nothing.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 6)), lf.DeFT(r=2))
        >>> {key: tuple(leaf.shape) for key, leaf in lf.partition(params)[0].items()}
        {'0.deft.P': (6, 2), '0.deft.R': (2, 4)}
    """

    usual_scale: ClassVar[float] = 1.0
    method: Literal["relu", "qr"] = "relu"
    para: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("method", self.method, ("relu", "qr"))
        check_flag("para", self.para)
        if self.para and (self.alpha is not None or self.alpha_pattern or self.dropout):
            raise ValueError("para: PaRa injects nothing that alpha or dropout would act on")

    @property
    def variant(self) -> str:
        """The name that belongs to the method."""
        return "deft" if self.method == "relu" else "deft_qr"


Bases = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From P, in float32 or wider: Q and what is removed, each (..., d_out, r)."""


def _by_relu(P: Tensor) -> tuple[Tensor, Tensor]:
    return P, P.relu()


def _by_qr(P: Tensor) -> tuple[Tensor, Tensor]:
    with without_autocast(P):
        Q = torch.linalg.qr(P).Q
    return Q, Q


def _start(bases: Bases, W: Weight, cfg: DeFT, generator: Generator) -> dict[str, Tensor]:
    d_out, _ = W.shape
    if cfg.r > d_out:
        raise ValueError(f"r = {cfg.r} exceeds d_out = {d_out}; lower r or rank_pattern")
    P = 0.02 * torch.randn(d_out, cfg.r, generator=generator, dtype=torch.float32)
    if cfg.para:
        return {"P": P}
    weight = at_least_float32(dense(W))
    _, removed = bases(P.to(weight))
    scale = torch.tensor(cfg.scale, dtype=torch.float64)
    R = removed.mT @ weight / cfg.scale
    start = {"_P0": P.clone(), "_R0": R.clone()}
    return {"P": P, "R": R, **start, "_scale": scale, **dropout_leaf(cfg.dropout)}


def _prepared(bases: Bases, params: Leaves, dtype: torch.dtype) -> dict[str, Tensor]:
    Q, removed = bases(at_least_float32(params["P"]))
    R = params.get("R")
    if "_P0" in params:  # a checkpoint of PEFT has no start
        removed = removed - bases(at_least_float32(params["_P0"]))[1]
        R = params["R"] - params["_R0"]
    found = {"basis": Q.to(dtype), "removed": removed.to(dtype)}
    if R is not None:
        found["injected"] = scaled(R, params["_scale"]).to(dtype)
    return found


def _applied(W: Weight, params: Leaves, x: Tensor) -> Tensor:
    y, b = linear(x, W), bias_of(W)
    h = -((y if b is None else y - b.to(y.dtype)) @ params["removed"].to(y.dtype))
    if "injected" in params:
        h = h + dropout(x, params.get(DROPOUT)) @ params["injected"].to(x.dtype).mT
    return y + h @ params["basis"].to(y.dtype).mT


def _weight(W: Tensor, factors: Leaves) -> Tensor:
    h = -factors["removed"].mT @ W
    return W + factors["basis"] @ (h + factors["injected"] if "injected" in factors else h)


def _peft_settings(leaves: Leaves, method: str) -> dict[str, Any]:
    r = leaves["P"].shape[-1]
    own = {"r": r, "decomposition_method": method, "para": "R" not in leaves}
    if "R" not in leaves:
        return own
    alpha = {} if leaves["_scale"] == 1 else {"alpha": alpha_of(leaves["_scale"], r)}
    return {**own, **alpha, **dropout_setting("deft_dropout", leaves)}


def _peft_constants(config: Mapping[str, Any], leaves: Leaves, W: Affine) -> dict[str, Tensor]:
    if "R" not in leaves:
        return {}
    scale = config["alpha"] / leaves["P"].shape[-1] if config.get("alpha") else 1.0
    return scale_like(scale, leaves["P"]) | dropout_leaf(config["deft_dropout"])


def _without_start(leaves: Leaves) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in leaves.items() if name not in {"_P0", "_R0"}}


def _peft_formats(method: str) -> tuple[PeftFormat, ...]:
    whole = PeftFormat(
        "DEFT",
        leaves={"P": PeftLeaf("deft_P"), "R": PeftLeaf("deft_R")},
        settings=lambda leaves, shape: _peft_settings(leaves, method),
        constants=_peft_constants,
        means=lambda config, path: config["decomposition_method"] == method,
        holds=lambda leaves: "R" in leaves and "_P0" not in leaves,
        defaults={"r": 8, "decomposition_method": "relu", "para": False, "deft_dropout": 0.0},
        ignored=("alpha", "init_scale", "init_weights"),
        lowers_rank=True,
        layers=("Linear", "Conv1D"),
    )
    alone = whole._replace(leaves={"P": PeftLeaf("deft_P")}, holds=lambda leaves: "R" not in leaves)
    started = whole._replace(convert=_without_start, holds=lambda leaves: "_P0" in leaves)
    return whole, alone, started


def _variant(name: str, method: str, bases: Bases) -> Variant:
    def init(W: Weight, cfg: DeFT, generator: Generator, stats: None = None) -> dict[str, Tensor]:
        return _start(bases, W, cfg, generator)

    def prepare(params: Leaves, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        return _prepared(bases, params, dtype)

    def apply(W: Weight, params: Leaves, x: Tensor) -> Tensor:
        ready = "basis" in params
        return _applied(W, params if ready else prepared(prepare, params, W, x.dtype), x)

    def weight(W: Weight, params: Leaves) -> Tensor:
        W = dense(W)
        return _weight(W, _prepared(bases, params, W.dtype))

    peft = ("DeftConfig", {"r": 8, "decomposition_method": method})
    return Variant(
        name=name,
        config=DeFT,
        family="multiplicative",
        init=init,
        apply=apply,
        prepare=prepare,
        weight=weight,
        leaves={
            "P": "d_out r",
            "R?": "r d_in",
            "_P0?": "d_out r",
            "_R0?": "r d_in",
            "_scale?": "",
            "_dropout?": "",
        },
        peft=_peft_formats(method),
        trials={
            name.replace("_", "-"): Trial({"method": method}, peft=peft),
            f"para-{method}": Trial({"method": method, "para": True}, start="elsewhere"),
        },
        stacks=True,
    )


VARIANTS = (_variant("deft", "relu", _by_relu), _variant("deft_qr", "qr", _by_qr))
