"""Weighted sums of adapters."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lora_func.adapter._keys import SHARED, Key, as_trainable, group, parse
from lora_func.adapter._merging import Merging, Method, merging_of
from lora_func.adapter._schema import check_leaves
from lora_func.checks import check_number
from lora_func.numerics import DROPOUT, at_least_float32, svd
from lora_func.variant import LowRankFn, Params
from lora_func.variants import by_name, lora

Term: TypeAlias = tuple[str, dict[str, Tensor], float]
"""The variant at a site, its leaves, and their weight."""


def combine(
    terms: Sequence[tuple[Mapping[str, Tensor], float]],
    method: Method = "sum",
    *,
    density: float | None = None,
    majority: Literal["total", "frequency"] = "total",
    rank: int | None = None,
    seed: int = 0,
) -> Params:
    """Add adapters, each with a weight.

    With "sum" the result changes the model by the weighted sum, exactly: low-rank changes are
    concatenated into a LoRA, and the leaves of variants whose change is linear in them are summed.
    A single adapter with weight 1 is returned as it is.

    The other methods are PEFT's, by their names there. "linear", "ties", "dare_linear", "dare_ties"
    and "magnitude_prune" treat the factors A and B of a LoRA apart, and the leaves of variants
    whose change is linear in them. For IA3 "linear" is PEFT's sum of the gains; it differs from
    "sum" unless the weights add up to 1. With "_svd" they treat the change of the weight, and keep
    the largest singular components of the result; so does "svd" with the plain sum.

    References:
        TIES, https://arxiv.org/abs/2306.01708; DARE, https://arxiv.org/abs/2311.03099. Code:
        huggingface/peft ``utils/merge_utils.py``, ``add_weighted_adapter``.

    Args:
        terms: Adapters and their weights.
        method: "sum", or one of PEFT's.
        density: The share of entries that pruning keeps, above 0 and at most 1.
        majority: Whether "ties" elects the sign of an entry by the sum of its values, or by their
            number.
        rank: The rank of the result of a method with "svd"; None for the largest of those of the
            terms' changes, which is 2r for a start that is subtracted.
        seed: From which the entries that "dare" drops follow.

    Returns:
        The sum. A site that only some terms have is changed by those terms.

    Raises:
        KeyError: If a key is malformed or names no variant.
        TypeError: If the variants at a site have no such sum.
        ValueError: If there is no term, the leaves of an adapter do not fit its variants, dropout
            or ranks differ where they must not, or a setting is not accepted.

    Examples:
        >>> import torch, lora_func as lf
        >>> one, two = (lf.init(torch.nn.Linear(4, 4), lf.LoRA(r=2), seed=s) for s in range(2))
        >>> lf.combine([(one, 0.5), (two, -1.0)])[".lora.A"].shape
        torch.Size([4, 4])
        >>> lf.combine([(one, 0.5), (two, 0.5)], "ties", density=0.5)[".lora.A"].shape
        torch.Size([2, 4])
    """
    if not terms:
        raise ValueError("terms: got none")
    merge = merging_of(method, density, majority, rank, seed)
    for params, weight in terms:
        check_number("weight", weight)
        check_leaves(params)
    if len(terms) == 1 and terms[0][1] == 1 and method == "sum":
        return {
            key: leaf.detach().clone().requires_grad_(leaf.requires_grad)
            for key, leaf in terms[0][0].items()
        }
    sites: dict[str, list[Term]] = {}
    for params, weight in terms:
        _check_unshared(params)
        for (site, name), keys in group(params).items():
            leaves = {leaf: params[key].detach() for leaf, key in keys.items()}
            sites.setdefault(site, []).append((name, leaves, float(weight)))
    combined: Params = {}
    for site, here in sites.items():
        if method == "sum":
            name, leaves = _sum(site, here, merge)
        elif method.endswith("svd"):
            name, leaves = lora.VARIANT.name, _of_changes(site, here, merge, rank)
        else:
            name, leaves = _of_leaves(site, here, merge)
        combined |= {str(Key(site, name, leaf)): tensor for leaf, tensor in leaves.items()}
    return as_trainable(combined)


def _check_unshared(params: Mapping[str, Tensor]) -> None:
    for key in params:
        site, name, leaf = parse(key)
        if site == SHARED and not leaf.startswith("_"):
            raise TypeError(
                f"{key}: adapters of {name} whose sites share a trained leaf have no sum; make "
                "LoRAs of them with to_lora"
            )


def _of_changes(site: str, here: Sequence[Term], merge: Merging, rank: int | None) -> Params:
    """The largest components of what a method makes of the changes of a weight."""
    factors = [by_name(name).low_rank for name, _, _ in here]
    if not all(factors):
        raise TypeError(
            f"{site}: adapters of {sorted({name for name, _, _ in here})} are no products of two "
            "factors; make LoRAs of them with to_lora"
        )
    pairs = [
        [*zip(*of_it(leaves), strict=True)]
        for (_, leaves, _), of_it in zip(here, factors, strict=True)
        if of_it is not None
    ]
    joined = [(torch.cat(A, -2), torch.cat(B, -1)) for A, B in pairs]
    if any(A.ndim != 2 for A, _ in joined):
        raise ValueError(f"{site}: takes single adapters of single weights; unstack them first")
    changes = [at_least_float32(B) @ at_least_float32(A) for A, B in joined]
    merged = merge(changes, [weight for _, _, weight in here], site)
    r = min(rank or max(len(A) for A, _ in joined), *merged.shape)
    U, S, Vh = svd(merged, r)
    dropout = _common_dropout(site, [leaves for _, leaves, _ in here])
    first = joined[0][0]
    return lora.from_factors(Vh.to(first.dtype), U * S) | dropout


def _of_leaves(site: str, here: Sequence[Term], merge: Merging) -> tuple[str, Params]:
    """What a method makes of the factors of LoRAs, or of leaves that change a weight linearly."""
    (name, *others), variant = {name for name, _, _ in here}, by_name(here[0][0])
    if not others and variant.low_rank is not None and {"A", "B", "_scale"} == variant.required:
        return name, _of_factors(site, here, merge)
    return _of_linear(site, here, merge, around=merge.method != "linear")


def _of_linear(site: str, here: Sequence[Term], merge: Merging, around: bool) -> tuple[str, Params]:
    """The same of leaves in which the change is linear; around their neutral value, or around 0."""
    (name, *others), each = {name for name, _, _ in here}, [leaves for _, leaves, _ in here]
    neutral = by_name(name).neutral
    if others or neutral is None:
        raise TypeError(
            f"{site}: adapters of {sorted({name, *others})} have no exact weighted sum; make LoRAs "
            "of them with to_lora"
        )
    made: Params = {}
    for leaf, tensor in each[0].items():
        shapes = [tuple(one[leaf].shape) for one in each]
        if len({*shapes}) > 1:
            raise ValueError(f"{site}: {leaf} has shapes {shapes}")
        if leaf in neutral:
            at = neutral[leaf] if around else 0.0
            moved = [one[leaf] - at for one in each]
            made[leaf] = at + merge(moved, [weight for _, _, weight in here], f"{site}.{leaf}")
        elif all(torch.equal(one[leaf], tensor) for one in each):
            made[leaf] = tensor.clone()
        else:
            raise TypeError(
                f"{site}: adapters of {name} with different {leaf} have no sum of the same kind; "
                "make LoRAs of them with to_lora"
            )
    return name, made


def _of_factors(site: str, here: Sequence[Term], merge: Merging) -> Params:
    """PEFT's way with factors: each gets the root of the weight and of the scale, A the sign."""
    each = [leaves for _, leaves, _ in here]
    shapes = {tuple(one["A"].shape) for one in each}
    if any(one["A"].ndim != 2 for one in each):
        raise ValueError(f"{site}: takes single adapters of single weights; unstack them first")
    if len(shapes) > 1:
        raise ValueError(
            f"{site}: A has shapes {sorted(shapes)}; factors of one rank can be merged; a method "
            'with "_svd" takes any ranks'
        )
    scaled = [weight * one["_scale"].item() for one, (_, _, weight) in zip(each, here, strict=True)]
    roots = [math.sqrt(abs(weight)) for weight in scaled]
    signed = [math.copysign(root, weight) for root, weight in zip(roots, scaled, strict=True)]
    A = merge([one["A"] for one in each], signed, f"{site}.A")
    B = merge([one["B"] for one in each], roots, f"{site}.B")
    return lora.from_factors(A, B) | _common_dropout(site, each)


def _sum(site: str, here: Sequence[Term], merge: Merging) -> tuple[str, Params]:
    factors = [by_name(name).low_rank for name, _, _ in here]
    if all(factors):
        return lora.VARIANT.name, _concatenated(site, here, factors)
    return _of_linear(site, here, merge, around=True)


def _concatenated(
    site: str,
    here: Sequence[Term],
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
