"""Weighted sums of adapters."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_func.adapter._keys import Key, as_trainable, group
from lora_func.adapter._schema import check_leaves
from lora_func.numerics import DROPOUT
from lora_func.variant import LowRankFn, Params
from lora_func.variants import by_name, lora


def combine(terms: Sequence[tuple[Mapping[str, Tensor], float]]) -> Params:
    """Add adapters, each with a weight: the result changes the model by the weighted sum.

    Low-rank changes are concatenated, exactly, into a LoRA. The leaves of variants whose change is
    linear in them are summed. A single adapter with weight 1 is returned as it is.

    Args:
        terms: Adapters and their weights.

    Returns:
        The sum. A site that only some terms have is changed by those terms.

    Raises:
        KeyError: If a key is malformed or names no variant.
        TypeError: If the variants at a site have no exact sum.
        ValueError: If there is no term, the leaves of an adapter do not fit its variants, or
            dropout differs.

    Example:
        >>> import torch, lora_func as lf
        >>> one, two = (lf.init(torch.nn.Linear(4, 4), lf.LoRA(r=2), seed=s) for s in range(2))
        >>> lf.combine([(one, 0.5), (two, -1.0)])[".lora.A"].shape
        torch.Size([4, 4])
    """
    if not terms:
        raise ValueError("terms: got none")
    for params, _ in terms:
        check_leaves(params)
    if len(terms) == 1 and terms[0][1] == 1:
        return {
            key: leaf.detach().clone().requires_grad_(leaf.requires_grad)
            for key, leaf in terms[0][0].items()
        }
    sites: dict[str, list[tuple[str, dict[str, Tensor], float]]] = {}
    for params, weight in terms:
        for (site, name), keys in group(params).items():
            leaves = {leaf: params[key].detach() for leaf, key in keys.items()}
            sites.setdefault(site, []).append((name, leaves, float(weight)))
    combined: Params = {}
    for site, here in sites.items():
        name, leaves = _sum(site, here)
        combined |= {str(Key(site, name, leaf)): tensor for leaf, tensor in leaves.items()}
    return as_trainable(combined)


def _sum(
    site: str, here: Sequence[tuple[str, dict[str, Tensor], float]]
) -> tuple[str, dict[str, Tensor]]:
    names = {name for name, _, _ in here}
    factors = [by_name(name).low_rank for name, _, _ in here]
    if all(factors):
        return lora.VARIANT.name, _concatenated(site, here, factors)
    (_, first, _), (name, *others) = here[0], names
    neutral = by_name(name).neutral
    if others or neutral is None:
        raise TypeError(
            f"{site}: adapters of {sorted(names)} have no exact weighted sum; make LoRAs of them "
            "with to_lora"
        )
    summed = {}
    for leaf, tensor in first.items():
        each = [leaves[leaf] for _, leaves, _ in here]
        if any(one.shape != tensor.shape for one in each):
            raise ValueError(f"{site}: {leaf} has shapes {[tuple(one.shape) for one in each]}")
        if leaf in neutral:
            at = neutral[leaf]
            moved = [weight * (t - at) for t, (_, _, weight) in zip(each, here, strict=True)]
            summed[leaf] = at + torch.stack(moved).sum(0)
        elif all(torch.equal(one, tensor) for one in each):
            summed[leaf] = tensor.clone()
        else:
            raise TypeError(
                f"{site}: adapters of {name} with different {leaf} have no sum of the same kind; "
                "make LoRAs of them with to_lora"
            )
    return name, summed


def _concatenated(
    site: str,
    here: Sequence[tuple[str, dict[str, Tensor], float]],
    factors: Sequence[LowRankFn | None],
) -> dict[str, Tensor]:
    pairs = [
        (A, weight * B)
        for (_, leaves, weight), of_it in zip(here, factors, strict=True)
        if of_it is not None
        for A, B in of_it(leaves)
    ]
    if len({A.shape[:-2] for A, _ in pairs}) > 1:
        raise ValueError(f"{site}: single adapters and stacks, or stacks of different sizes")
    A, B = torch.cat([A for A, _ in pairs], -2), torch.cat([B for _, B in pairs], -1)
    return lora.from_factors(A, B) | _common_dropout(site, [leaves for _, leaves, _ in here])


def _common_dropout(site: str, each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    found = [leaves[DROPOUT] for leaves in each if DROPOUT in leaves]
    if not found:
        return {}
    if len(found) < len(each) or not all(torch.equal(rate, found[0]) for rate in found):
        rates = [leaves.get(DROPOUT) for leaves in each]
        raise ValueError(
            f"{site}: adapters with different dropout, {rates}; make {DROPOUT!r} equal, or leave "
            "it out of all"
        )
    return {DROPOUT: found[0].clone()}
