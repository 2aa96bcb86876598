"""AdaLoRA: LoRA as singular triplets; a schedule keeps the important ones.

    W' = W + s B diag(E) A,   s = alpha / (r + 1e-5)

*Identity at the start because* E = 0, so the added term is exactly zero in every dtype.

Asks of W: ``linear`` only. ``lora_func.rules.adalora`` scores the triplets and sets E of the others
to zero; without it this is a LoRA of rank r.

References:
    https://arxiv.org/abs/2303.10512, eq. 3. Code: QingruZhang/AdaLoRA, huggingface/peft
    ``tuners/adalora/layer.py``.

Deviations: the paper has no scale; codes and we divide alpha by the first r, which stays when
triplets are pruned. PEFT makes that r a trained parameter on a base that is not float32, and does
not save it; here it is a constant. The usual rank is 12, of which 8 are kept, alpha 8; the learning
rate is that of LoRA or higher.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from lora_func.configs import LowRankConfig
from lora_func.numerics import DROPOUT, add_low_rank, dropout_leaf, dropout_setting, scaled
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant, prepared
from lora_func.variants import _low_rank
from lora_func.variants._low_rank import alpha_of, scale_like
from lora_func.weights import Affine, Weight

_MORE = 1e-5
"""What the codes add to r before they divide by it."""


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(LowRankConfig):
    """Adaptive budget allocation. r is the rank before any triplet is pruned.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.AdaLoRA(r=2))
        >>> {key: tuple(leaf.shape) for key, leaf in lf.partition(params)[0].items()}
        {'0.adalora.A': (2, 4), '0.adalora.B': (3, 2), '0.adalora.E': (2,)}
    """

    r: int = 12
    alpha: float | None = 8.0

    @property
    def scale(self) -> float:
        """The factor ``s``."""
        return super().scale if self.alpha is None else self.alpha / (self.r + _MORE)


def init(W: Weight, cfg: AdaLoRA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw A and B, leave E at zero.

    Returns:
        A (r, d_in), B (d_out, r), E (r,), _scale (); _dropout () if there is any.
    """
    d_out, d_in = W.shape

    def drawn(*shape: int) -> Tensor:
        return 0.02 * torch.randn(shape, generator=generator, dtype=torch.float32)

    return {
        "A": drawn(cfg.r, d_in),
        "B": drawn(d_out, cfg.r),
        "E": torch.zeros(cfg.r),
        "_scale": torch.tensor(cfg.scale, dtype=torch.float64),
        **dropout_leaf(cfg.dropout),
    }


def _up(params: Mapping[str, Tensor]) -> Tensor:
    """``s B diag(E)``, shape (..., d_out, r)."""
    return scaled(params["B"] * params["E"].unsqueeze(-2), params["_scale"])


def low_rank(params: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Give the factors, E and the scale in B.

    Returns:
        One pair, shapes (..., r, d_in) and (..., d_out, r).
    """
    return [(params["A"], _up(params))]


def _as_lora(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same change as a LoRA with a scale of 1, for functions of its factors."""
    ((A, B),) = low_rank(params)
    return {"A": A, "B": B, "_scale": torch.ones_like(params["_scale"])}


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Compute ``s B diag(E)`` in the dtype of the activations.

    Returns:
        up.
    """
    return {"up": _up(params).to(dtype)}


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W) + s drop(x) Aᵀ diag(E) Bᵀ``.

    Returns:
        Shape (..., d_out).
    """
    if "up" not in params:
        params = prepared(prepare, params, W, x.dtype)
    return add_low_rank(x, W, params["A"], params["up"], rate=params.get(DROPOUT))


def _peft_settings(leaves: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
    r = len(leaves["E"])
    found = {"init_r": r, "lora_alpha": alpha_of(leaves["_scale"], r + _MORE), "total_step": 1}
    return found | dropout_setting("lora_dropout", leaves)


def _peft_constants(
    config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Affine
) -> dict[str, Tensor]:
    scale = config["lora_alpha"] / (config["init_r"] + _MORE)
    return scale_like(scale, leaves["A"]) | dropout_leaf(config["lora_dropout"])


VARIANT = Variant(
    name="adalora",
    config=AdaLoRA,
    family="low-rank",
    init=init,
    apply=apply,
    prepare=prepare,
    casts=("A",),
    weight=lambda W, params: _low_rank.weight(W, _as_lora(params)),
    delta_norm=lambda params, shape: _low_rank.delta_norm(_as_lora(params), shape),
    leaves={"A": "r d_in", "B": "d_out r", "E": "r", "_scale": "", "_dropout?": ""},
    low_rank=low_rank,
    peft=(
        PeftFormat(
            "ADALORA",
            leaves={
                "A": PeftLeaf("lora_A"),
                "B": PeftLeaf("lora_B"),
                "E": PeftLeaf(
                    "lora_E",
                    write=lambda E: E[..., None].clone(),
                    read=lambda E, config: E[..., 0].clone(),
                ),
            },
            settings=_peft_settings,
            constants=_peft_constants,
            defaults={"init_r": 12, "lora_alpha": 8, "lora_dropout": 0.0},
            inert={
                name: values
                for name, values in _low_rank.PEFT_LORA.inert.items()
                if name != "init_lora_weights"
            }
            | {"use_dora": (None, False), "lora_bias": (None, False)},
            ignored=(
                *("r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step"),
                *("orth_reg_weight", "rank_pattern", "init_lora_weights", "use_rslora"),
                *_low_rank.PEFT_LORA.ignored,
            ),
            one_rank=True,
            layers=("Linear", "Conv1D"),
        ),
    ),
    trials={"adalora": Trial(lr=3e-3, peft=("AdaLoraConfig", {"init_r": 12, "total_step": 1000}))},
    pads=True,
    stacks=True,
    products_only=True,
)
