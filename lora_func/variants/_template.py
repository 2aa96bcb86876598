"""Template: one phrase that says what the variant does.

    W' = W + B diag(g) A

*Identity at the start because* B = 0, so the added term is exactly zero in every dtype.

Asks of W: ``linear`` only. (Say ``dense`` at init if the variant reads the weight itself.)

References:
    Paper, link, equation number. Reference code, file.

Deviations: where paper and code disagree, which one is followed, and why.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.checks import check_number
from lora_func.configs import RankConfig
from lora_func.numerics import add_low_rank, check_rank, kaiming_uniform, low_rank_norm
from lora_func.variant import Trial, Variant
from lora_func.weights import Weight, dense


@dataclass(frozen=True, kw_only=True)
class Template(RankConfig):
    """One line about the method; then the fields that the base class does not have.

    Attributes:
        g_initial: The start of g; not 0, where every gradient is zero.

    Examples:
        >>> import torch, lora_func as lf
        >>> from lora_func.variants import _template
        >>> lf.register(_template.VARIANT)
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), _template.Template(r=2))
        >>> {key: tuple(leaf.shape) for key, leaf in params.items()}
        {'0.template.A': (2, 4), '0.template.B': (3, 2), '0.template.g': (2,)}
    """

    g_initial: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("g_initial", self.g_initial)
        if self.g_initial == 0:
            raise ValueError("g_initial: got 0, at which every gradient is zero; choose another")


def init(W: Weight, cfg: Template, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw A, leave B at zero; all randomness comes from the generator.

    Returns:
        A (r, d_in), B (d_out, r), g (r,).
    """
    d_out, d_in = W.shape
    check_rank(cfg.r, (d_out, d_in))
    return {
        "A": kaiming_uniform(cfg.r, d_in, generator),
        "B": torch.zeros(d_out, cfg.r),
        "g": torch.full((cfg.r,), cfg.g_initial),
    }


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute the whole output, with the bias that W may carry, in the dtype of x.

    Returns:
        Shape (..., d_out).
    """
    return add_low_rank(x, W, params["A"], params["B"], params["g"])


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute the dense adapted weight.

    Returns:
        Shape (d_out, d_in).
    """
    W, ((A, B),) = dense(W), low_rank(params)
    return W + (B @ A).to(W.dtype)


def low_rank(params: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Give the change as products of two factors; leave this out if it is of another form.

    Returns:
        One pair, shapes (..., r, d_in) and (..., d_out, r).
    """
    return [(params["A"], params["B"] * params["g"][..., None, :])]


def delta_norm(params: Mapping[str, Tensor], shape: tuple[int, int] | None) -> Tensor:
    """Compute the norm of the change; leave this out if it needs the dense change.

    Returns:
        Shape ().
    """
    ((A, B),) = low_rank(params)
    return low_rank_norm(A, B, B.new_ones(()))


VARIANT = Variant(
    name="template",
    config=Template,
    family="low-rank",
    init=init,
    apply=apply,
    leaves={"A": "r d_in", "B": "d_out r", "g": "r"},
    weight=weight,
    delta_norm=delta_norm,
    low_rank=low_rank,
    trials={"template": Trial()},
    pads=True,
    stacks=True,
    products_only=True,
)
