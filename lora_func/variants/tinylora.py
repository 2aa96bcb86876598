"""TinyLoRA: a few trained numbers that mix random cores between frozen singular vectors.

    W' = W + B (Σ_i v_i P_i) A,   A = √S Vᵀ and B = U √S of the r largest singular triplets of W

*Identity at the start because* v = 0, so the added term is exactly zero in every dtype.

Asks of W: the dense weight at init; ``linear`` only afterwards.

References:
    https://arxiv.org/abs/2602.04118. Code: huggingface/peft ``tuners/tinylora/layer.py``.

Deviations: the P_i have N(0, 1 / r) entries, as in PEFT; the paper leaves their distribution open.
``tied=True`` gives all sites one v (PEFT's ``weight_tying=1``), and False each site its own (0);
groups in between are not offered. There is no scale. More than r² numbers are redundant. The usual
rank is 2, with 64 numbers; learning rates are far above those of LoRA.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from lora_func.checks import check_count
from lora_func.configs import DropoutConfig, RankConfig
from lora_func.numerics import dropout_leaf, dropout_setting, svd
from lora_func.variant import PeftFormat, PeftLeaf, SharedFn, Trial, Variant
from lora_func.variants._factors import views_of
from lora_func.weights import Affine, Weight, dense


@dataclass(frozen=True, kw_only=True)
class TinyLoRA(DropoutConfig, RankConfig):
    """LoRA with u trained numbers for each site, or for the whole model.

    Attributes:
        u: How many numbers.
        tied: Whether all sites share them.

    Examples:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
        >>> params = lf.init(model, lf.TinyLoRA(u=5, tied=True))
        >>> {key: tuple(leaf.shape) for key, leaf in lf.partition(params)[0].items()}
        {'*.tinylora_tied.v': (5,)}
    """

    r: int = 2
    u: int = 64
    tied: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("u", self.u)

    @property
    def variant(self) -> str:
        """The name that belongs to the setting."""
        return "tinylora_tied" if self.tied else "tinylora"


def shared(weights: Mapping[str, Weight], cfg: TinyLoRA, generator: Generator) -> dict[str, Tensor]:
    """Set the numbers of all sites to zero.

    Returns:
        v (u,).
    """
    return {"v": torch.zeros(cfg.u)}


def init(W: Weight, cfg: TinyLoRA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Take the singular vectors, draw the cores.

    Returns:
        v (u,) unless it is shared, _A (r, d_in), _B (d_out, r), _P (u, r, r); _dropout () if there
        is any.
    """
    U, S, Vh = svd(dense(W), cfg.r)
    root = S.sqrt()
    cores = torch.randn(cfg.u, cfg.r, cfg.r, generator=generator, dtype=torch.float32)
    return {
        **({} if cfg.tied else {"v": torch.zeros(cfg.u)}),
        "_A": root[:, None] * Vh,
        "_B": U * root,
        "_P": cores * cfg.r**-0.5,
        **dropout_leaf(cfg.dropout),
    }


def _up(params: Mapping[str, Tensor]) -> Tensor:
    """``B Σ v_i P_i``, shape (d_out, r)."""
    P = params["_P"]
    return params["_B"] @ (params["v"].to(P.dtype)[..., None, None] * P).sum(-3)


def _settings(leaves: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
    u, r, _ = leaves["_P"].shape
    return {"r": r, "u": u, **dropout_setting("tinylora_dropout", leaves)}


def _constants(
    config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Affine
) -> dict[str, Tensor]:
    return dropout_leaf(config["tinylora_dropout"])


_PEFT = PeftFormat(
    "TINYLORA",
    leaves={f"_{name}": PeftLeaf(f"tinylora_{name}") for name in "ABP"},
    settings=lambda leaves, shape: {**_settings(leaves, shape), "weight_tying": 1.0},
    constants=_constants,
    means=lambda config, path: config["weight_tying"] == 1,
    defaults={"r": 2, "u": 64, "tinylora_dropout": 0.0, "weight_tying": 0.0},
    inert={"weight_tying": (None, 0, 1)},
    ignored=("projection_seed", "save_projection", "init_v_bound", "init_weights"),
    lowers_rank=True,
    shared={"v": "base_model.tinylora_v.0"},
    layers=("Linear", "Conv1D"),
)
_PEFT_EACH = _PEFT._replace(
    leaves={"v": PeftLeaf("tinylora_v"), **_PEFT.leaves},
    settings=lambda leaves, shape: {**_settings(leaves, shape), "weight_tying": 0.0},
    means=lambda config, path: config["weight_tying"] == 0,
    shared={},
    numbered="tinylora_v",
)


def _variant(name: str, shared: SharedFn | None, peft: PeftFormat, trial: Trial) -> Variant:
    return Variant(
        name=name,
        config=TinyLoRA,
        family="SVD" if shared is None else "shared",
        init=init,
        shared=shared,
        leaves={"v": "u", "_A": "r d_in", "_B": "d_out r", "_P": "u r r", "_dropout?": ""},
        trials={name.replace("_", "-"): trial},
        pads=True,
        **{**views_of("_A", _up), "peft": (peft,)},
    )


_TIED = {"r": 4, "u": 16, "tied": True}
VARIANTS = (
    _variant("tinylora", None, _PEFT_EACH, Trial(lr=1e-2, peft=("TinyLoraConfig", {}))),
    _variant("tinylora_tied", shared, _PEFT, Trial(_TIED, lr=1e-2)),
)
