"""SHiRA: a few entries of the weight are trained, the others are not.

    W' = W + D,   D has nnz = r (d_out + d_in) entries, the others are zero

*Identity at the start because* the entries of D are zero.

Asks of W: ``linear``, or the weight itself where it is a plain tensor; ``dense`` at init for the
masks "magnitude" and "snip".

References:
    https://arxiv.org/abs/2406.13175, section 3. Code: huggingface/peft ``tuners/shira``.

Deviations: PEFT, which has the random mask and takes functions for others, adds D to a copy of the
weight where it can; here it is added if that does not round D, else x Dᵀ is a second product.
The paper's structured mask is not offered. Positions are kept, row by row, as a constant; without
them the values mean nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from lora_func.checks import check_choice
from lora_func.configs import Calibration, RankConfig
from lora_func.numerics import (
    WeightGradient,
    add_entries,
    join_gradients,
    observe_gradient,
    prepare_entries,
    weight_with_entries,
)
from lora_func.variant import PeftFormat, PeftLeaf, Trial, Variant, prepared
from lora_func.weights import Weight, dense


@dataclass(frozen=True, kw_only=True)
class SHiRA(RankConfig):
    """Sparse high-rank adaptation; r sets the number of entries to those of a LoRA of that rank.

    Attributes:
        mask: Which entries: "random"; "magnitude", the largest of W; "gradient", those with the
            largest gradient of the loss, and "snip", with the largest |W * gradient|; both
            need ``init(..., data=batches)``.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(8, 6)), lf.SHiRA(r=1))
        >>> {key: tuple(leaf.shape) for key, leaf in params.items()}
        {'0.shira.values': (14,), '0.shira._indices': (2, 14)}
    """

    r: int = 32
    mask: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mask", self.mask, ("random", "magnitude", "gradient", "snip"))

    @property
    def calibration(self) -> Calibration | None:
        """The gradients, for the masks that are made from them."""
        return "gradients" if self.mask in ("gradient", "snip") else None


def init(
    W: Weight, cfg: SHiRA, generator: Generator, stats: WeightGradient | None = None
) -> dict[str, Tensor]:
    """Choose the entries.

    Returns:
        values (nnz,), _indices (2, nnz): rows and columns, sorted row by row.

    Raises:
        ValueError: If there are more entries than W has, or a mask lacks its data.
    """
    d_out, d_in = W.shape
    nnz = cfg.r * (d_out + d_in)
    if nnz > d_out * d_in:
        raise ValueError(
            f"r = {cfg.r} asks for {nnz} entries, the weight has {d_out * d_in}; lower r"
        )
    flat = _chosen(W, cfg, generator, stats, nnz).sort().values
    return {"values": torch.zeros(nnz), "_indices": torch.stack([flat // d_in, flat % d_in])}


def _chosen(
    W: Weight, cfg: SHiRA, generator: Generator, stats: WeightGradient | None, nnz: int
) -> Tensor:
    if cfg.mask == "random":
        d_out, d_in = W.shape
        return torch.randperm(d_out * d_in, generator=generator)[:nnz]
    score = torch.ones(()) if cfg.mask == "gradient" else dense(W)
    if cfg.mask != "magnitude":
        if stats is None:
            raise ValueError(
                f"mask={cfg.mask!r} needs calibration data; pass init(..., data=batches)"
            )
        stats.check()
        score = score.to(stats.total) * stats.total
    return score.flatten().abs().topk(nnz).indices


def prepare(
    params: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Find the places of the entries, and cast their values.

    Returns:
        What ``add_entries`` takes.
    """
    return prepare_entries(params["values"], params["_indices"], shape, dtype)


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute ``linear(x, W + D)``, or ``linear(x, W) + x Dᵀ``.

    Returns:
        Shape (..., d_out).
    """
    if "rows" not in params:
        params = prepared(prepare, params, W, x.dtype)
    return add_entries(x, W, params)


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``W + D``.

    Returns:
        Shape (d_out, d_in).
    """
    return weight_with_entries(dense(W), params["values"], params["_indices"])


def delta_norm(params: Mapping[str, Tensor], shape: tuple[int, int] | None) -> Tensor:
    """Compute the norm of D.

    Returns:
        Shape ().
    """
    return params["values"].double().square().sum(-1).sqrt()


def _peft_settings(leaves: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
    r, rest = divmod(len(leaves["values"]), sum(shape))
    if rest:
        raise ValueError(
            f"has {len(leaves['values'])} entries; PEFT has r (d_out + d_in), which is a multiple "
            f"of {sum(shape)}"
        )
    return {"mask_type": "random", "r": r}


VARIANT = Variant(
    name="shira",
    config=SHiRA,
    family="sparse",
    init=init,
    apply=apply,
    prepare=prepare,
    weight=weight,
    observe=observe_gradient,
    join=join_gradients,
    delta_norm=delta_norm,
    leaves={"values": "nnz", "_indices": "2 nnz"},
    neutral={"values": 0.0},
    peft=(
        PeftFormat(
            "SHIRA",
            leaves={
                "values": PeftLeaf("shira_weight"),
                "_indices": PeftLeaf("shira_indices", torch.Tensor.int, lambda t, _: t.double()),
            },
            settings=_peft_settings,
            defaults={"r": 32},
            ignored=("mask_type", "random_seed"),
        ),
    ),
    trials={
        "shira": Trial({"r": 8}, peft=("ShiraConfig", {"r": 8})),
        "shira-snip": Trial({"r": 8, "mask": "snip"}, data=True),
    },
    stacks=True,
    builds_dense=True,
)
