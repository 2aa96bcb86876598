"""VeRA: trained gains around random projections that all layers share.

    W' = W + diag(λ_b) B diag(λ_d) A

*Identity at the start because* λ_b = 0.

Asks of W: ``linear`` only. A and B are constants under the site ``*``, as wide as the widest layer;
a site uses ``A[:, :d_in]`` and ``B[:d_out]``.

References:
    https://arxiv.org/abs/2310.11454, eq. 2. Code: huggingface/peft ``tuners/vera``.

Deviations: none in the mathematics. PEFT draws A and B from a generator of its own seed
(``projection_prng_key``) with the same distributions; here they come from ``init``'s seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.checks import check_count, check_number
from lora_func.configs import DropoutConfig, LinearConfig
from lora_func.numerics import (
    DROPOUT,
    add_low_rank,
    dropout_leaf,
    dropout_setting,
    low_rank_norm,
)
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant
from lora_func.weights import Weight, dense


@dataclass(frozen=True, kw_only=True)
class VeRA(DropoutConfig, LinearConfig):
    """Vector-based random matrix adaptation.

    Attributes:
        r: Rank of the shared projections; it costs time, and r trained numbers for each site.
        d_initial: Where λ_d starts.

    Examples:
        >>> import torch, lora_func as lf
        >>> list(lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.VeRA(r=2)))
        ['*.vera._A', '*.vera._B', '0.vera.lambda_d', '0.vera.lambda_b']
    """

    r: int = 256
    d_initial: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        check_number("d_initial", self.d_initial)
        if self.d_initial == 0:
            raise ValueError("d_initial: got 0, at which every gradient is zero; choose another")


def shared(weights: Mapping[str, Weight], cfg: VeRA, generator: Generator) -> dict[str, Tensor]:
    """Draw the projections from U(-√(6 / columns), √(6 / columns)), A first.

    Returns:
        _A (r, widest d_in), _B (widest d_out, r).
    """
    d_out, d_in = (max(sides) for sides in zip(*(W.shape for W in weights.values()), strict=True))
    leaves = {}
    for name, shape in (("_A", (cfg.r, d_in)), ("_B", (d_out, cfg.r))):
        bound = (6 / shape[1]) ** 0.5
        drawn = torch.empty(shape, dtype=torch.float32)
        leaves[name] = drawn.uniform_(-bound, bound, generator=generator)
    return leaves


def init(W: Weight, cfg: VeRA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Set λ_d to its start and λ_b to zero.

    Returns:
        lambda_d (r,), lambda_b (d_out,); _dropout () if there is any.
    """
    d_out, _ = W.shape
    return {
        "lambda_d": torch.full((cfg.r,), float(cfg.d_initial)),
        "lambda_b": torch.zeros(d_out),
        **dropout_leaf(cfg.dropout),
    }


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W) + λ_b * (((x Aᵀ) * λ_d) Bᵀ)``.

    Returns:
        Shape (..., d_out).
    """
    A, B = _projections(params, W.shape[-1])
    return add_low_rank(x, W, A, B, params["lambda_d"], params["lambda_b"], params.get(DROPOUT))


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W + diag(λ_b) B diag(λ_d) A``.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    A, B = _projections(params, W.shape[-1])
    return W + ((params["lambda_b"][:, None] * B) @ (params["lambda_d"][:, None] * A)).to(W.dtype)


def _projections(params: Mapping[str, Tensor], d_in: int) -> tuple[Tensor, Tensor]:
    return params["_A"][..., :d_in], params["_B"][..., : params["lambda_b"].shape[-1], :]


def delta_norm(params: Mapping[str, Tensor], shape: tuple[int, int] | None) -> Tensor | None:
    """Compute the norm of the added term; A is wider than the site, so the shape is needed.

    Returns:
        Shape (), or None without a shape.
    """
    if shape is None:
        return None
    lambda_d, lambda_b = params["lambda_d"][..., None], params["lambda_b"][..., None]
    A, B = _projections(params, shape[1])
    return low_rank_norm(lambda_d * A, lambda_b * B, B.new_ones(()))


VARIANT = Variant(
    name="vera",
    config=VeRA,
    family="shared",
    init=init,
    apply=apply,
    casts=("lambda_d", "lambda_b", "_A", "_B"),
    weight=weight,
    shared=shared,
    leaves={
        "lambda_d": "r",
        "lambda_b": "d_out",
        "_A": "r widest_in",
        "_B": "widest_out r",
        "_dropout?": "",
    },
    delta_norm=delta_norm,
    peft=(
        PeftFormat(
            "VERA",
            leaves={
                "lambda_d": PeftLeaf("vera_lambda_d"),
                "lambda_b": PeftLeaf("vera_lambda_b"),
            },
            settings=lambda leaves, shape: {
                "r": leaves["lambda_d"].shape[-1],
                **dropout_setting("vera_dropout", leaves),
            },
            constants=lambda config, leaves, W: dropout_leaf(config["vera_dropout"]),
            defaults={"r": 256, "vera_dropout": 0.0},
            ignored=("d_initial", "projection_prng_key", "save_projection"),
            shared={"_A": "base_model.vera_A", "_B": "base_model.vera_B"},
            layers=("Linear", "Conv1D"),
        ),
    ),
    trials={"vera": Trial(lr=1e-2, peft=("VeraConfig", {"r": 256}))},
    pads=True,
    stacks=True,
    products_only=True,
)
