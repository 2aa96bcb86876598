"""Trained coefficients at random places, which PEFT draws anew from a seed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_func.checks import check_count, check_number
from lora_func.configs import LinearConfig
from lora_func.numerics import add_dense
from lora_func.variant import PrepareFn, prepared
from lora_func.variants._low_rank import alpha_of, scale_like
from lora_func.weights import Affine, Weight, dense

Leaves = Mapping[str, Tensor]
Change = Callable[[Leaves, tuple[int, ...]], Tensor]

LOCATED = {"spectrum": "n", "_indices": "2 n", "_seed": "", "_scale": ""}
"""The leaves."""


@dataclass(frozen=True, kw_only=True)
class LocatedConfig(LinearConfig):
    """A config of a variant that trains n coefficients for each site.

    Attributes:
        n_frequency: How many coefficients.
        scaling: What multiplies the change.
        random_loc_seed: Draws the places; weights of one shape get the same places.
        sigma: The standard deviation of the coefficients at the start; above 0 the start is not the
            base.
    """

    n_frequency: int = 1000
    scaling: float = 1.0
    random_loc_seed: int = 777
    sigma: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_frequency", self.n_frequency)
        check_count("random_loc_seed", self.random_loc_seed, least=0)
        check_number("scaling", self.scaling)
        check_number("sigma", self.sigma)
        if self.sigma < 0:
            raise ValueError(f"sigma: got {self.sigma}, expected at least 0")


def init(
    W: Weight, cfg: LocatedConfig, generator: torch.Generator, stats: None = None
) -> dict[str, Tensor]:
    """Draw the places; the coefficients are zero, or drawn.

    Returns:
        spectrum (n,), _indices (2, n): rows and columns, _seed (), _scale ().

    Raises:
        ValueError: If there are more coefficients than entries of W.
    """
    d_out, d_in = W.shape
    n = cfg.n_frequency
    if n > d_out * d_in:
        raise ValueError(
            f"n_frequency: got {n}, the weight has {d_out * d_in} entries; lower it, or name the "
            "small layers in a config of their own"
        )
    return {
        "spectrum": cfg.sigma * torch.randn(n, generator=generator, dtype=torch.float32),
        "_indices": _places((d_out, d_in), n, cfg.random_loc_seed),
        "_seed": torch.tensor(cfg.random_loc_seed),
        "_scale": torch.tensor(cfg.scaling, dtype=torch.float64),
    }


def _places(shape: tuple[int, int], n: int, seed: int) -> Tensor:
    """Rows and columns as PEFT draws them, shape (2, n)."""
    flat = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))[:n]
    return torch.stack([flat // shape[1], flat % shape[1]])


def views_of(prepare: PrepareFn, change: Change) -> dict[str, Any]:
    """Make the fields of a variant that builds its change from coefficients.

    Args:
        prepare: The variant's ``prepare``, which gives ``places`` among others.
        change: From prepared leaves and the shape of the weight, the change.

    Returns:
        Fields of ``Variant``.
    """

    def apply(W: Weight, params: Leaves, x: Tensor) -> Tensor:
        if "places" not in params:
            params = prepared(prepare, params, W, x.dtype)
        return add_dense(x, W, change(params, W.shape).to(x.dtype))

    def weight(W: Weight, params: Leaves) -> Tensor:
        W = dense(W)
        return W + change(prepared(prepare, params, W, W.dtype), W.shape).to(W.dtype)

    return {
        "family": "spectral",
        "prepare": prepare,
        "apply": apply,
        "weight": weight,
        "neutral": {"spectrum": 0.0},
        "stacks": True,
        "builds_dense": True,
    }


def scattered(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """Add up values at places of a flattened matrix.

    Args:
        values: Shape (..., m).
        places: Shape (..., m).
        shape: Of the matrix.

    Returns:
        Shape (..., *shape), in the dtype of the values.
    """
    zeros = values.new_zeros(*values.shape[:-1], shape[0] * shape[1])
    return zeros.scatter_add(-1, places, values).view(*values.shape[:-1], *shape)


def peft_settings(leaves: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Any]:
    """Return PEFT's settings.

    Raises:
        ValueError: If the places are not those that PEFT draws.
    """
    n, seed = len(leaves["spectrum"]), int(leaves["_seed"])
    if not torch.equal(_places(shape, n, seed), leaves["_indices"].cpu()):
        raise ValueError(f"_indices: PEFT draws other places from the seed {seed}")
    scaling = alpha_of(leaves["_scale"], 1)
    return {"n_frequency": n, "scaling": scaling, "random_loc_seed": seed}


def peft_constants(
    config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Affine
) -> dict[str, Tensor]:
    """Draw the places, and read the scale."""
    (d_out, d_in), seed = W.shape, config["random_loc_seed"]
    spectrum = leaves["spectrum"]
    return {
        "_indices": _places((d_out, d_in), len(spectrum), seed).double(),
        "_seed": torch.tensor(seed, dtype=torch.float64),
        **scale_like(config["scaling"], spectrum.unsqueeze(-1)),
    }
