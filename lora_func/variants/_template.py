"""One phrase that says what the variant does.

    W' = diag(1 + g) W,   b' = (1 + g) b

*Identity at the start because* g = 0, and the output is y + g y, not (1 + g) y.

Asks of W: ``linear`` only. (Say ``dense`` at init if the variant reads the weight itself.)

References:
    Paper, link, equation number. Reference code, file.

Deviations: where paper and code disagree, which we follow, and why.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.configs import LinearConfig
from lora_func.variant import Variant
from lora_func.weights import Weight, dense, linear


@dataclass(frozen=True, kw_only=True)
class Template(LinearConfig):
    """One line; then the fields that LinearConfig does not have.

    Attributes:
        start: Where g starts. Fields are documented here and checked in ``__post_init__``.
    """

    start: float = 0.0


def init(W: Weight, cfg: Template, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Say which leaf starts where; all randomness comes from the generator.

    Returns:
        g (d_out,).
    """
    d_out, _ = W.shape
    return {"g": torch.full((d_out,), cfg.start)}


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute the whole output, with the bias that W may carry, in the dtype of x.

    Returns:
        Shape (..., d_out).
    """
    y = linear(x, W)
    return y + y * params["g"].to(y.dtype)


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute the dense adapted weight.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    return W + W * params["g"].to(W.dtype)[:, None]


def bias(b: Tensor | None, params: Mapping[str, Tensor]) -> Tensor | None:
    """Compute the adapted bias; leave this function out if the bias stays as it is.

    Returns:
        Shape (d_out,), or None.
    """
    return None if b is None else b + b * params["g"].to(b.dtype)


VARIANT = Variant(
    name="template",
    config=Template,
    init=init,
    apply=apply,
    weight=weight,
    bias=bias,
    leaves={"g": "d_out"},
    products_only=True,
)
