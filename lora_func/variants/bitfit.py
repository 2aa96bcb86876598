"""BitFit: a trained term added to the bias.

    b' = b + δ

*Identity at the start because* δ = 0.

Asks of W: ``linear`` only.

References:
    https://arxiv.org/abs/2106.10199. Code: benzakenelad/BitFit, huggingface/peft ``tuners/beft``
    (additive) and ``bias="all"`` (in place).

Deviations: the paper trains the biases that a model has, those of LayerNorms too, which ``Full``
does; this is the additive form, for linear layers, that PEFT calls BEFT. A layer without a bias is
refused unless the config allows a new one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.checks import check_flag
from lora_func.configs import LinearConfig
from lora_func.numerics import along_rows
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant
from lora_func.weights import Affine, Weight, bias_of, dense, linear


@dataclass(frozen=True, kw_only=True)
class BitFit(LinearConfig):
    """Bias-only fine-tuning of linear layers.

    Attributes:
        allow_new_bias: Whether layers without a bias may get one.

    Examples:
        >>> import torch, lora_func as lf
        >>> list(lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.BitFit()))
        ['0.bitfit.delta']
    """

    allow_new_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("allow_new_bias", self.allow_new_bias)


def init(W: Weight, cfg: BitFit, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Add nothing yet.

    Returns:
        delta (d_out,).

    Raises:
        ValueError: If the layer has no bias and may not get one.
    """
    if bias_of(W) is None and not cfg.allow_new_bias:
        raise ValueError("the layer has no bias; leave it out, or pass allow_new_bias=True")
    d_out, _ = W.shape
    return {"delta": torch.zeros(d_out)}


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``x Wᵀ + (b + δ)``.

    Returns:
        Shape (..., d_out).
    """
    delta = params["delta"]
    if isinstance(W, Affine) and W.bias is not None and delta.ndim == 1:
        return linear(x, W._replace(bias=bias(W.bias, params)))
    y = linear(x, W)
    return y + along_rows(delta).to(y.dtype)


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Give the frozen weight.

    Returns:
        Shape (d_out, d_in).
    """
    return dense(W)


def bias(b: Tensor | None, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``b + δ``.

    Returns:
        Shape (d_out,).
    """
    delta = params["delta"]
    return delta if b is None else (b + delta).to(b.dtype)


VARIANT = Variant(
    name="bitfit",
    config=BitFit,
    family="bias",
    init=init,
    apply=apply,
    weight=weight,
    bias=bias,
    leaves={"delta": "d_out"},
    neutral={"delta": 0.0},
    peft=(
        PeftFormat(
            "BEFT",
            leaves={"delta": PeftLeaf("beft_bias", lambda d: d[None], lambda d, _: d.flatten())},
        ),
    ),
    trials={"bitfit": Trial({"allow_new_bias": True}, lr=3e-3)},
    stacks=True,
)
