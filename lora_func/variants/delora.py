"""DeLoRA: a low-rank term of normalised directions, whose strength is one number.

    W' = W + (λ / r) Σ_k  (b_k / ‖b_k‖) (a_k / ‖a_k‖)ᵀ diag(w),   w_j = ‖W_{:,j}‖

*Identity at the start because* B = 0 ("zero_b"), or because the same term with the frozen copies
A0, B0 is subtracted, as a difference that is exactly zero there ("frozen_copy").

Asks of W: ``dense`` at init, ``linear`` after that.

References:
    https://arxiv.org/abs/2503.18225, eq. 8-9. Code: ExplainableML/DeLoRA, huggingface/peft
    ``tuners/delora/layer.py``.

Deviations: the paper scales by the scalar ‖W‖, both codes by the norms of the input channels; we
follow the codes. The paper subtracts a frozen copy with the initial λ, the authors' code with the
current one, which we follow; PEFT starts from B = 0, our default too. Note what that start does:
norms are floored at 1e-4 as in the codes, so after one step of any learning rate B is no longer
zero and the normalised term is at full strength. "frozen_copy" has no such jump.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lora_func.checks import check_choice, check_number
from lora_func.configs import DropoutConfig, RankConfig
from lora_func.numerics import (
    DROPOUT,
    add_low_rank,
    at_least_float32,
    dropout,
    dropout_leaf,
    dropout_setting,
    kaiming_uniform,
    low_rank_difference,
    low_rank_norm,
    low_rank_term,
)
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant, prepared
from lora_func.weights import Weight, dense

_FLOOR = 1e-4


@dataclass(frozen=True, kw_only=True)
class DeLoRA(DropoutConfig, RankConfig):
    """Decoupled low-rank adaptation: angles and strength are trained apart.

    Attributes:
        lambda_: Where the strength λ starts; not 0, which would have no gradient.
        init: "zero_b", or "frozen_copy" at twice the cost and without the jump of the first step.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(4, 3)), lf.DeLoRA(r=2))
        >>> list(params)
        ['0.delora.A', '0.delora.B', '0.delora.lambda', '0.delora._w_norm']
    """

    lambda_: float = 15.0
    init: str = "zero_b"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lambda_", self.lambda_)
        if self.lambda_ == 0:
            raise ValueError("lambda_: got 0, at which every gradient is zero; choose another")
        check_choice("init", self.init, ("zero_b", "frozen_copy"))


def init(W: Weight, cfg: DeLoRA, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Draw A, and B unless it starts at zero.

    Returns:
        A (r, d_in), B (d_out, r), lambda (), _w_norm (d_in,); _A0 and _B0 for a frozen copy;
        _dropout () if there is any.
    """
    d_out, d_in = W.shape
    leaves = {
        "A": kaiming_uniform(cfg.r, d_in, generator),
        "B": torch.zeros(d_out, cfg.r),
        "lambda": torch.tensor(cfg.lambda_, dtype=torch.float64),
        "_w_norm": at_least_float32(dense(W)).square().sum(-2).sqrt(),
        **dropout_leaf(cfg.dropout),
    }
    if cfg.init == "frozen_copy":
        leaves["B"] = kaiming_uniform(d_out, cfg.r, generator)
        leaves |= {"_A0": leaves["A"].clone(), "_B0": leaves["B"].clone()}
    return leaves


def _norm(v: Tensor, axis: int) -> Tensor:
    return v.square().sum(axis, keepdim=True).clamp_min(_FLOOR**2).sqrt()


def _pair(params: Mapping[str, Tensor], A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    A, B = at_least_float32(A), at_least_float32(B)
    strength = (params["lambda"] / A.shape[-2])[..., None, None].to(B.dtype)
    channels = params["_w_norm"][..., None, :].to(A.dtype)
    return A * channels, B * (strength / (_norm(B, -2) * _norm(A, -1).mT))


def _factors(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    A, B = _pair(params, params["A"], params["B"])
    if "_A0" not in params:
        return A, B
    return low_rank_difference(A, B, *_pair(params, params["_A0"], params["_B0"]))


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Fold the norms and the strength into the factors.

    Returns:
        down and up; with dropout and a frozen copy also dropped_down and dropped_up.
    """
    if DROPOUT not in params or "_A0" not in params:
        down, up = _factors(params)
        return {"down": down.to(dtype), "up": up.to(dtype)}
    down, up = _pair(params, params["A"], params["B"])
    A0, B0 = _pair(params, params["_A0"], params["_B0"])
    return {
        "down": A0.to(dtype),
        "up": -B0.to(dtype),
        "dropped_down": down.to(dtype),
        "dropped_up": up.to(dtype),
    }


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute the frozen output and the low-rank term, with the norms folded into the factors.

    Dropout takes from the trained term alone, not from a frozen copy.

    Returns:
        Shape (..., d_out).
    """
    if "up" not in params:
        params = prepared(prepare, params, W, x.dtype)
    rate, down, up = params.get(DROPOUT), params["down"], params["up"]
    if "dropped_up" not in params:
        return add_low_rank(x, W, down, up, rate=rate)
    term = low_rank_term(dropout(x, rate), params["dropped_down"], params["dropped_up"])
    return add_low_rank(x, W, down, up) + term


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W`` plus the low-rank term.

    Returns:
        Shape (d_out, d_in).
    """
    W, (A, B) = dense(W), _factors(params)
    return W + (B @ A).to(W.dtype)


def delta_norm(params: Mapping[str, Tensor], shape: tuple[int, int] | None) -> Tensor:
    """Compute the norm of the low-rank term.

    Returns:
        Shape ().
    """
    A, B = _factors(params)
    return low_rank_norm(A, B, B.new_ones(()))


VARIANT = Variant(
    name="delora",
    config=DeLoRA,
    family="low-rank",
    init=init,
    apply=apply,
    prepare=prepare,
    weight=weight,
    delta_norm=delta_norm,
    leaves={
        "A": "r d_in",
        "B": "d_out r",
        "lambda": "",
        "_w_norm": "d_in",
        "_A0?": "r d_in",
        "_B0?": "d_out r",
        "_dropout?": "",
    },
    peft=(
        PeftFormat(
            "DELORA",
            leaves={
                "A": PeftLeaf("delora_A"),
                "B": PeftLeaf("delora_B"),
                "lambda": PeftLeaf(
                    "delora_lambda", lambda t: t.reshape(1), lambda t, _: t.reshape(())
                ),
                "_w_norm": PeftLeaf("delora_w_norm"),
            },
            settings=lambda leaves, shape: {
                "r": leaves["A"].shape[-2],
                **dropout_setting("module_dropout", leaves),
            },
            constants=lambda config, leaves, W: dropout_leaf(config["module_dropout"]),
            defaults={"r": 8, "module_dropout": 0.0},
            ignored=("delora_lambda", "lambda_pattern"),
            holds=lambda leaves: "_A0" not in leaves,
            patterns={"r": "rank_pattern"},
        ),
    ),
    trials={
        "delora": Trial({"lambda_": 1.0}, peft=("DeloraConfig", {"r": 8})),
        "delora-copy": Trial({"init": "frozen_copy"}),
    },
    stacks=True,
    products_only=True,
)
