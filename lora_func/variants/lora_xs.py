"""LoRA-XS: a trained r x r core between frozen singular vectors of the weight.

    W' = W + s U R diag(S) Vᵀ,   U, S, V the r largest singular triplets of W;   s = alpha / r

*Identity at the start because* R = 0, so the added term is exactly zero in every dtype.

Asks of W: the dense weight at init; ``linear`` only afterwards.

References:
    https://arxiv.org/abs/2405.17604, eq. 3. Code: MohammadrezaBanaei/LoRA-XS
    ``utils/initialization_utils.py``.

Deviations: the authors draw R from N(0, 1e-5²); ``sigma`` gives that, and 0 is our default, where
the gradient of R is alive. The paper multiplies row vectors, so its R is the transpose of this one,
which is that of the code. PEFT has no such method; it is written as the LoRA with A = diag(S) Vᵀ
and B = U R. The scale is 1 and the learning rate about 4e-3, ten times that of LoRA.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from lora_func.checks import check_number
from lora_func.configs import LowRankConfig
from lora_func.numerics import dropout_leaf, scaled, svd
from lora_func.variant import Trial, Variant
from lora_func.variants._factors import views_of
from lora_func.weights import Weight, dense


@dataclass(frozen=True, kw_only=True)
class LoRAXS(LowRankConfig):
    """LoRA with extremely small numbers of parameters: r² for each site.

    Attributes:
        sigma: The standard deviation of the core at the start; above 0 the start is not the base.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.LoRAXS(r=2))
        >>> {key: tuple(leaf.shape) for key, leaf in lf.partition(params)[0].items()}
        {'0.lora_xs.R': (2, 2)}
    """

    usual_scale: ClassVar[float] = 1.0
    r: int = 64
    sigma: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("sigma", self.sigma)
        if self.sigma < 0:
            raise ValueError(f"sigma: got {self.sigma}, expected at least 0")


def init(W: Weight, cfg: LoRAXS, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Take the singular vectors; the core is zero, or drawn.

    Returns:
        R (r, r), _A (r, d_in), _B (d_out, r), _scale (); _dropout () if there is any.
    """
    U, S, Vh = svd(dense(W), cfg.r)
    return {
        "R": cfg.sigma * torch.randn(cfg.r, cfg.r, generator=generator, dtype=torch.float32),
        "_A": S[:, None] * Vh,
        "_B": U,
        "_scale": torch.tensor(cfg.scale, dtype=torch.float64),
        **dropout_leaf(cfg.dropout),
    }


def _up(params: Mapping[str, Tensor]) -> Tensor:
    """``s U R``, shape (d_out, r)."""
    return scaled(params["_B"] @ params["R"], params["_scale"])


VARIANT = Variant(
    name="lora_xs",
    config=LoRAXS,
    family="SVD",
    init=init,
    leaves={"R": "r r", "_A": "r d_in", "_B": "d_out r", "_scale": "", "_dropout?": ""},
    trials={"lora-xs": Trial({"r": 16}, lr=4e-3)},
    pads=True,
    **views_of("_A", _up),
)
