"""HiRA: a trained low-rank matrix that multiplies the frozen weight elementwise.

    W' = W + W ⊙ (B A)

*Identity at the start because* B = 0, so the added term is exactly zero in every dtype.

Asks of W: the dense weight in each call. The change has a rank of up to r rank(W), and no cheaper
form than a matrix of the size of W.

References:
    https://openreview.net/forum?id=TwJrTz9cRS (ICLR 2025), eq. 4. Code: hqsiswiliam/hira,
    huggingface/peft ``tuners/hira/layer.py``.

Deviations: none in the numbers; there is no scale. PEFT runs the frozen weight and ``W ⊙ (B A)`` as
two products; without dropout one product with their sum is the same, and cheaper. The usual rank is
32; the learning rate is higher than that of LoRA, since the entries of W are small.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.configs import DropoutConfig, RankConfig
from lora_func.numerics import (
    DROPOUT,
    add_dense,
    dropout,
    dropout_leaf,
    dropout_setting,
    kaiming_uniform,
)
from lora_func.variant import (
    CONVOLUTIONS,
    PeftFormat,
    PeftLeaf,
    Trial,
    Variant,
    differs_on_convolution,
)
from lora_func.weights import Weight, dense


@dataclass(frozen=True, kw_only=True)
class HiRA(DropoutConfig, RankConfig):
    """Hadamard high-rank adaptation, ``W + W ⊙ (B A)``.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.HiRA(r=2))
        >>> {key: tuple(leaf.shape) for key, leaf in params.items()}
        {'0.hira.A': (2, 4), '0.hira.B': (3, 2)}
    """

    r: int = 32


def init(W: Weight, cfg: HiRA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw A, leave B at zero.

    Returns:
        A (r, d_in), B (d_out, r); _dropout () if there is any.
    """
    d_out, d_in = W.shape
    return {
        "A": kaiming_uniform(cfg.r, d_in, generator),
        "B": torch.zeros(d_out, cfg.r),
        **dropout_leaf(cfg.dropout),
    }


def _change(W: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    return W * torch.matmul(params["B"], params["A"]).to(W.dtype)


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W')``; with dropout ``linear(x, W) + drop(x) (W ⊙ (B A))ᵀ``.

    Returns:
        Shape (..., d_out).
    """
    dropped = dropout(x, params[DROPOUT]) if DROPOUT in params else None
    return add_dense(x, W, _change(dense(W), params), dropped)


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W + W ⊙ (B A)``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    return W + _change(W, params)


_PEFT = PeftFormat(
    "HIRA",
    leaves={"A": PeftLeaf("hira_A"), "B": PeftLeaf("hira_B")},
    settings=lambda leaves, shape: {
        "r": leaves["A"].shape[-2],
        **dropout_setting("hira_dropout", leaves),
    },
    constants=lambda config, leaves, W: dropout_leaf(config["hira_dropout"]),
    patterns={"r": "rank_pattern"},
    defaults={"r": 32, "hira_dropout": 0.0},
    ignored=("init_weights",),
    layers=("Linear", "Conv1D"),
)
_PEFT_EMBEDDING = _PEFT._replace(
    leaves={"A": PeftLeaf("hira_embedding_A"), "B": PeftLeaf("hira_embedding_B")},
    constants=lambda config, leaves, W: {},
    layers=("Embedding",),
)
_PEFT_CONVOLUTION = _PEFT._replace(
    leaves={
        "A": PeftLeaf("hira_A", layout="kernel"),
        "B": PeftLeaf("hira_B", layout="ones"),
    },
    layers=CONVOLUTIONS,
    refuses=differs_on_convolution,
)

VARIANT = Variant(
    name="hira",
    config=HiRA,
    family="multiplicative",
    init=init,
    apply=apply,
    casts=("A", "B"),
    weight=weight,
    leaves={"A": "r d_in", "B": "d_out r", "_dropout?": ""},
    peft=(_PEFT, _PEFT_EMBEDDING, _PEFT_CONVOLUTION),
    trials={"hira": Trial({"r": 16}, lr=1e-2, peft=("HiraConfig", {"r": 16}))},
    pads=True,
    stacks=True,
    builds_dense=True,
)
