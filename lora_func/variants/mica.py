"""MiCA: LoRA whose B is fixed to the minor left singular vectors of the weight.

    W' = W + s B A,   B = the left vectors of the r smallest singular values of W, orthonormal

*Identity at the start because* A = 0, so the added term is exactly zero in every dtype.

Asks of W: ``dense`` at init, ``linear`` after that.

References:
    https://arxiv.org/abs/2604.01694. Code: huggingface/peft ``tuners/lora/layer.py``
    (``mica_init``).

Deviations: none. As in the code, the vectors are those of the economy decomposition: where
d_out > d_in they do not span the null space of Wᵀ. The usual rank is 8, s = 2; the learning rate is
that of LoRA or higher.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.configs import LowRankConfig
from lora_func.numerics import check_rank, dropout_leaf, svd
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant
from lora_func.variants import _low_rank as low_rank
from lora_func.weights import Weight, dense


@dataclass(frozen=True, kw_only=True)
class MiCA(LowRankConfig):
    """Minor component adaptation: A is trained, B is not.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.MiCA(r=2))
        >>> {key: tuple(leaf.shape) for key, leaf in params.items()}
        {'0.mica.A': (2, 4), '0.mica._B': (3, 2), '0.mica._scale': ()}
    """


def init(W: Weight, cfg: MiCA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Find B, leave A at zero.

    Returns:
        A (r, d_in), _B (d_out, r), _scale (); _dropout () if there is any.
    """
    check_rank(cfg.r, W.shape)
    U, _, _ = svd(dense(W), min(W.shape))
    return {
        "A": torch.zeros(cfg.r, W.shape[1]),
        "_B": U[:, -cfg.r :].contiguous(),
        "_scale": torch.tensor(cfg.scale, dtype=torch.float64),
        **dropout_leaf(cfg.dropout),
    }


def _as_lora(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {leaf.removeprefix("_") if leaf == "_B" else leaf: t for leaf, t in params.items()}


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Compute ``s B`` in the dtype of the activations.

    Returns:
        up.
    """
    return low_rank.prepare(_as_lora(params), shape, dtype)


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W) + s drop(x) Aᵀ Bᵀ``.

    Returns:
        Shape (..., d_out).
    """
    return low_rank.apply(W, _as_lora(params), x)


def _format(of_lora: PeftFormat) -> PeftFormat:
    B = of_lora.leaves["B"]
    return of_lora._replace(
        leaves={"A": of_lora.leaves["A"], "_B": PeftLeaf(B.name, layout=B.layout)},
        settings=lambda leaves, shape: {
            **of_lora.settings(leaves, shape),
            "init_lora_weights": "mica",
        },
        inert={**of_lora.inert, "init_lora_weights": ("mica",)},
    )


VARIANT = Variant(
    name="mica",
    config=MiCA,
    family="SVD",
    init=init,
    apply=apply,
    prepare=prepare,
    casts=("A",),
    weight=lambda W, params: low_rank.weight(W, _as_lora(params)),
    delta_norm=lambda params, shape: low_rank.delta_norm(_as_lora(params), shape),
    leaves={"A": "r d_in", "_B": "d_out r", "_scale": "", "_dropout?": ""},
    low_rank=lambda params: low_rank.low_rank(_as_lora(params)),
    peft=(
        _format(low_rank.PEFT_LORA._replace(layers=("Linear",))),
        *(one._replace(convert=_as_lora) for one in low_rank.PEFT_FORMATS),
    ),
    trials={"mica": Trial(lr=3e-3, peft=("LoraConfig", {"r": 8, "init_lora_weights": "mica"}))},
    pads=True,
    stacks=True,
    products_only=True,
)
