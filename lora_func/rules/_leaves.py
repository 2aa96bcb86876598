"""The leaves that rules read and write."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lora_func.adapter import group
from lora_func.numerics import at_least_float32
from lora_func.variant import Params
from lora_func.variants import by_name

GradientRule: TypeAlias = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Params]
"""From an adapter and its gradients, the gradients that an optimizer shall see."""


class Pair(NamedTuple):
    """The factors of a site, whose product changes its weight.

    Attributes:
        A: The key of A (..., r, d_in).
        B: The key of B (..., d_out, r).
        scale: The key of the scale (...).
    """

    A: str
    B: str
    scale: str

    def factors(self, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return A, B and the scale (..., 1, 1), detached, in float32 or better."""
        A, B = (wide(params[key]) for key in self[:2])
        return A, B, params[self.scale].detach().to(A)[..., None, None]


def wide(t: Tensor) -> Tensor:
    """Return a tensor detached, in float32 or wider."""
    return at_least_float32(t.detach())


def pairs_of(params: Mapping[str, Tensor]) -> list[Pair]:
    """Find the trained factors of an adapter.

    Returns:
        The pairs.

    Raises:
        KeyError: If a key is malformed or names no variant.
        ValueError: If there are none.
    """
    found = []
    for (_, name), keys in group(params).items():
        axes = {leaf: axes for leaf, axes in by_name(name).leaves.items() if leaf[0] != "_"}
        between = [leaf for leaf, own in axes.items() if "r" in own.split() and leaf not in "AB"]
        is_pair = (axes.get("A"), axes.get("B")) == ("r d_in", "d_out r") and not between
        if is_pair and "_scale" in keys:
            found.append(Pair(keys["A"], keys["B"], keys["_scale"]))
    if not found:
        raise ValueError(
            "params: no site has trained factors A and B, nothing between them, and a scale; this "
            "rule is for LoRA, its starts and DoRA"
        )
    return found


def check_one_kind(leaves: Mapping[str, Tensor]) -> None:
    """Check that all leaves have as many axes, where sites are looked at together.

    Raises:
        ValueError: If some are of stacked experts and others are not.
    """
    by_axes = {leaf.ndim: key for key, leaf in leaves.items()}
    if len(by_axes) > 1:
        few, many = by_axes[min(by_axes)], by_axes[max(by_axes)]
        raise ValueError(
            f"{many}: belongs to stacked weights, and {few} does not; this rule looks at all sites "
            "together, and takes them apart: give it one kind at a time"
        )


def rates_of(lr: float | Tensor, like: Tensor) -> Tensor:
    """Shape a learning rate, or one for each adapter (K,), to fit a leaf.

    Returns:
        Shape (), or (K, 1, ...).

    Raises:
        ValueError: If a rate is not positive.
    """
    rates = torch.as_tensor(lr, dtype=like.dtype, device=like.device)
    if not bool((rates > 0).all()):
        raise ValueError(f"lr: got {lr!r}, expected numbers above 0")
    return rates.reshape(rates.shape + (1,) * (like.ndim - rates.ndim)) if rates.ndim else rates


def gradients(params: Mapping[str, Tensor]) -> Params:
    """Return the gradients that a backward pass left at the leaves: key -> gradient."""
    return {key: leaf.grad for key, leaf in params.items() if leaf.grad is not None}


def assign(params: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
    """Put gradients at the leaves of an adapter; a leaf without one gets None.

    Raises:
        KeyError: If there is a gradient for a key that the adapter lacks.
    """
    if unknown := grads.keys() - params.keys():
        raise KeyError(f"grads: {sorted(unknown)[0]!r} is no key of the adapter")
    for key, leaf in params.items():
        leaf.grad = grads[key].to(leaf) if key in grads else None


def per_member(rules: Sequence[GradientRule | None]) -> GradientRule:
    """Make one rule for a stack, whose members follow rules of their own.

    Args:
        rules: The rule of each of the K members; None leaves its gradients as they are.

    Returns:
        A rule for a stack of K adapters. A leaf without a gradient under its member's rule gets
        zeros.

    Examples:
        >>> import torch, lora_func as lf
        >>> from lora_func import rules
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> stacked = lf.stack([lf.init(model, lf.LoRA(r=2), seed=s) for s in range(2)])
        >>> grads = {key: torch.ones_like(stacked[key]) for key in ("0.lora.A", "0.lora.B")}
        >>> changed = rules.per_member([None, rules.riemannian])(stacked, grads)
        >>> [bool((changed["0.lora.A"][k] == 1).all()) for k in range(2)]
        [True, False]
    """

    def rule(params: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> Params:
        results = []
        sizes = {len(leaf) for leaf in grads.values()}
        if sizes - {len(rules)}:
            raise ValueError(f"rules: got {len(rules)} for a stack of {sorted(sizes)} adapters")
        for i, own in enumerate(rules):
            member = {key: leaf[i] for key, leaf in grads.items()}
            at = {key: leaf[i] for key, leaf in params.items()}
            results.append(member if own is None else own(at, member))
        return {
            key: torch.stack([found.get(key, torch.zeros_like(leaf[0])) for found in results])
            for key, leaf in grads.items()
        }

    return rule
