"""Sums of the changes of several adapters that leave out what disagrees, or is small, or chance."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lora_func.checks import check_choice, check_count, check_number
from lora_func.numerics import generator_for

Method: TypeAlias = Literal[
    "sum",
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "svd",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]
METHODS: tuple[Method, ...] = Method.__args__  # type: ignore[attr-defined]
Majority: TypeAlias = Literal["total", "frequency"]


class Merging(NamedTuple):
    """How several tensors become one.

    Attributes:
        method: The method, without "_svd".
        density: The share of entries that stay; None for methods without it.
        majority: How the sign of an entry is elected.
        seed: From which random entries follow.
    """

    method: str
    density: float | None
    majority: Majority
    seed: int

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float], place: str) -> Tensor:
        """Make one tensor.

        Args:
            tensors: Tensors of one shape.
            weights: The weight of each.
            place: A name of the place, so that each place draws entries of its own.

        Returns:
            Their sum.
        """
        stacked = torch.stack([self._pruned(t, i, place) for i, t in enumerate(tensors)])
        factors = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)
        weighted = stacked * factors.reshape(-1, *[1] * (stacked.ndim - 1))
        if not self.method.endswith("ties"):
            return weighted.sum(0)
        elected = (stacked if self.majority == "total" else stacked.sign()).sum(0)
        agrees = stacked.sign() == torch.where(elected >= 0, 1, -1)
        merged: Tensor = (weighted * agrees).sum(0) / agrees.sum(0).clamp_min(1)
        return merged

    def _pruned(self, tensor: Tensor, i: int, place: str) -> Tensor:
        if self.density is None or self.density >= 1:
            return tensor
        if not self.method.startswith("dare"):
            kept = tensor.abs().flatten().topk(max(1, int(self.density * tensor.numel()))).indices
            mask = torch.zeros_like(tensor).flatten().index_fill(0, kept, 1)
            return tensor * mask.view_as(tensor)
        generator = generator_for(f"{self.seed}/{place}/{i}")
        share = torch.full(tensor.shape, self.density)
        return tensor * torch.bernoulli(share, generator=generator).to(tensor) / self.density


def merging_of(
    method: str, density: float | None, majority: Majority, rank: int | None, seed: int
) -> Merging:
    """Check the settings of a method.

    Args:
        method: One of ``METHODS``.
        density: The share of entries that stay.
        majority: How the sign of an entry is elected.
        rank: The rank of the result, for a method that chooses one.
        seed: From which random entries follow.

    Returns:
        The method.

    Raises:
        ValueError: If one is not accepted.
    """
    check_choice("method", method, METHODS)
    check_choice("majority", majority, ("total", "frequency"))
    plain = method.removesuffix("_svd")
    prunes = plain in ("ties", "dare_linear", "dare_ties", "magnitude_prune")
    if prunes != (density is not None):
        raise ValueError(
            f"density: got {density!r}; {method!r} needs a share of entries to keep"
            if prunes
            else f"density: got {density!r}; {method!r} leaves nothing out"
        )
    if density is not None:
        check_number("density", density, above=0)
        if density > 1:
            raise ValueError(f"density: got {density!r}, expected at most 1")
    if rank is not None:
        check_count("rank", rank)
        if not method.endswith("svd"):
            raise ValueError(f"rank: got {rank}; {method!r} does not choose a rank")
    return Merging("linear" if plain in ("svd", "sum") else plain, density, majority, seed)
