"""EVA: LoRA whose A spans the principal directions of the layer's inputs.

    W' = W + s B A,   A = the r principal components of the inputs, orthonormal rows

*Identity at the start because* B = 0.

Asks of W: ``linear`` only. Needs calibration data.

References:
    https://arxiv.org/abs/2410.07170. Code: huggingface/peft ``tuners/lora/eva.py`` and
    ``utils/incremental_pca.py``, by the authors.

Deviations: the paper writes an SVD of the inputs, the authors' code centres them first (PCA); we
follow the code, ``center=False`` gives the other. PEFT updates a truncated decomposition until its
components settle (``tau``); here all data is decomposed exactly, from a d_in x d_in scatter matrix
that sites with the same input share. PEFT skips batches with too few tokens; we refuse data
with too few. PEFT's ``whiten`` depends on how much data there was and is not offered.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from lora_func.checks import check_flag, check_number
from lora_func.configs import Calibration, LowRankConfig
from lora_func.numerics import (
    Components,
    Moments,
    check_rank,
    dropout_leaf,
    join_moments,
    observe_moments,
    principal_components,
)
from lora_func.variant import Trial, Variant
from lora_func.variants._low_rank import (
    LOW_RANK,
    PEFT_EXPORTS,
    apply,
    delta_norm,
    low_rank,
    prepare,
    weight,
)
from lora_func.weights import Weight


@dataclass(frozen=True, kw_only=True)
class EVA(LowRankConfig):
    """Explained variance adaptation; make it with ``init(model, EVA(), data=batches)``.

    Attributes:
        rho: With rho > 1 the ranks are redistributed: of the first ``rho r`` components of every
            site those that explain most of their site's variance are kept, as many as before in
            all. A site may end without any, and then has no adapter. alpha goes with the rank, so
            that s stays.
        center: Whether the mean of the inputs is taken away first.
    """

    rho: float = 1.0
    center: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rho", self.rho)
        if self.rho < 1:
            raise ValueError(f"rho: got {self.rho!r}, expected at least 1")
        check_flag("center", self.center)

    @property
    def calibration(self) -> Calibration:
        """The inputs of each site."""
        return "inputs"


def conclude(
    weights: Mapping[str, Weight], configs: Mapping[str, EVA], stats: Mapping[str, Moments]
) -> dict[str, tuple[EVA, Components]]:
    """Find the components once for each input, and share out the ranks.

    Returns:
        Site -> (config with its rank, components), without the sites whose rank is 0.

    Raises:
        ValueError: If a site saw too few tokens, or its rank is too large.
    """
    found: dict[tuple[int, bool], Components] = {}
    for site, cfg in configs.items():
        try:
            check_rank(cfg.r, weights[site].shape)
            stats[site].check_enough(_most(cfg, weights[site]) + cfg.center)
        except ValueError as error:
            raise ValueError(f"{site}: eva: {error}") from error
        inputs = (id(stats[site]), cfg.center)
        if inputs not in found:
            found[inputs] = principal_components(stats[site], cfg.center)
        if found[inputs].explained[cfg.r - 1] == 0:
            raise ValueError(
                f"{site}: eva: its inputs span fewer than r = {cfg.r} directions; pass more data"
            )
    components = {site: found[id(stats[site]), cfg.center] for site, cfg in configs.items()}
    ranks = _ranks(weights, configs, components)
    return {
        site: (_with_rank(cfg, ranks[site]), components[site])
        for site, cfg in configs.items()
        if ranks[site]
    }


def _most(cfg: EVA, W: Weight) -> int:
    return min(round(cfg.r * cfg.rho), *W.shape)


def _ranks(
    weights: Mapping[str, Weight],
    configs: Mapping[str, EVA],
    components: Mapping[str, Components],
) -> dict[str, int]:
    budget = sum(cfg.r for cfg in configs.values())
    candidates = [
        (-share, site)
        for site, cfg in configs.items()
        for share in components[site].explained[: _most(cfg, weights[site])].tolist()
    ]
    kept = [site for _, site in sorted(candidates, key=lambda c: c[0])[:budget]]
    return {site: kept.count(site) for site in configs}


def _with_rank(cfg: EVA, r: int) -> EVA:
    return replace(cfg, r=r, alpha=None if cfg.alpha is None else cfg.alpha * r / cfg.r)


def init(
    W: Weight, cfg: EVA, generator: Generator, stats: Components | None = None
) -> dict[str, Tensor]:
    """Take the first r components as A, leave B at zero.

    Returns:
        A (r, d_in), B (d_out, r), _scale (); _dropout () if there is any.

    Raises:
        ValueError: If there was no data.
    """
    if stats is None:
        raise ValueError("needs calibration data; pass init(..., data=batches)")
    d_out, _ = W.shape
    return {
        "A": stats.rows[: cfg.r].clone(),
        "B": torch.zeros(d_out, cfg.r),
        "_scale": torch.tensor(cfg.scale, dtype=torch.float64),
        **dropout_leaf(cfg.dropout),
    }


VARIANT = Variant(
    name="eva",
    config=EVA,
    family="low-rank",
    init=init,
    apply=apply,
    prepare=prepare,
    casts=("A",),
    weight=weight,
    observe=observe_moments,
    join=join_moments,
    conclude=conclude,
    delta_norm=delta_norm,
    leaves=LOW_RANK,
    low_rank=low_rank,
    peft=PEFT_EXPORTS,
    trials={
        "eva": Trial(
            data=True,
            peft=("LoraConfig", {"r": 8, "init_lora_weights": "eva", "eva_config": {}}),
        ),
        "eva-rho2": Trial({"rho": 2.0}, data=True, drops_sites=True),
    },
    pads=True,
    stacks=True,
    products_only=True,
)
