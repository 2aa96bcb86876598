"""SVFT: a few trained entries between all singular vectors of the weight.

    W' = W + U M Vᵀ,   U, S, V the singular vectors of W, M sparse and trained

*Identity at the start because* M = 0, so the added term is exactly zero in every dtype.

Asks of W: the dense weight at init; ``linear`` only afterwards.

References:
    https://arxiv.org/abs/2405.19597, eq. 2. Code: VijayLingam95/SVFT ``svft/svft_layers.py``.

Deviations: the authors draw M and multiply it by a trained gate, so that their start is off by a
sixth of the output; M = 0 has an alive gradient, and there is no gate. Their code drops the part of
W beyond the rank; here W stays whole. They draw random entries with repetition, we without.
PEFT has no such method; it is written as a LoRA of the rank. With all directions, U and V are
larger than W, and U M is as large. The usual pattern is the diagonal; the learning rate is ten to a
hundred times that of LoRA.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from lora_func.checks import check_choice, check_count
from lora_func.configs import LinearConfig
from lora_func.numerics import svd
from lora_func.variant import Trial, Variant
from lora_func.variants._factors import views_of
from lora_func.weights import Weight, dense


@dataclass(frozen=True, kw_only=True)
class SVFT(LinearConfig):
    """Singular vectors guided fine-tuning.

    Attributes:
        r: The number of singular directions; None for all.
        band: How many diagonals on each side of the main one are trained.
        pattern: "banded", or "random": as many entries, drawn from all.

    Examples:
        >>> import torch, lora_func as lf
        >>> params = lf.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), lf.SVFT(band=1))
        >>> {key: tuple(leaf.shape) for key, leaf in lf.partition(params)[0].items()}
        {'0.svft.m': (10,)}
    """

    r: int | None = None
    band: int = 0
    pattern: Literal["banded", "random"] = "banded"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None:
            check_count("r", self.r)
        check_count("band", self.band, least=0)
        check_choice("pattern", self.pattern, ("banded", "random"))


def init(W: Weight, cfg: SVFT, generator: Generator, stats: None = None) -> dict[str, Tensor]:
    """Take the singular vectors, and choose the entries.

    Returns:
        m (entries,); _places (2, entries), the rows and columns of M; _U (d_out, r), _Vh (r, d_in).

    Raises:
        ValueError: If the band is as wide as M.
    """
    r = min(W.shape) if cfg.r is None else cfg.r
    if cfg.band >= r:
        raise ValueError(f"band = {cfg.band} is no smaller than the {r} singular directions")
    U, _, Vh = svd(dense(W), r)
    rows, columns = torch.meshgrid(torch.arange(r), torch.arange(r), indexing="ij")
    places = torch.stack([rows, columns])[:, (rows - columns).abs() <= cfg.band]
    if cfg.pattern == "random":
        drawn = torch.randperm(r * r, generator=generator)[: places.shape[1]].sort().values
        places = torch.stack([drawn // r, drawn % r])
    zeros = torch.zeros(places.shape[1])
    return {"m": zeros, "_places": places.double(), "_U": U, "_Vh": Vh}


def _core(params: Mapping[str, Tensor]) -> Tensor:
    """M with its zeros, (..., r, r)."""
    m, r = params["m"], params["_U"].shape[-1]
    rows, columns = params["_places"].long().unbind(-2)
    flat = m.new_zeros(*m.shape[:-1], r * r).scatter(-1, rows * r + columns, m)
    return flat.unflatten(-1, (r, r))  # type: ignore[no-any-return, no-untyped-call]


VARIANT = Variant(
    name="svft",
    config=SVFT,
    family="SVD",
    init=init,
    leaves={"m": "entries", "_places": "2 entries", "_U": "d_out r", "_Vh": "r d_in"},
    trials={
        "svft": Trial(lr=3e-2),
        "svft-band": Trial({"band": 2}, lr=3e-2),
    },
    **views_of("_Vh", lambda params: params["_U"] @ _core(params)),
)
