"""Adapters as terms: the best LoRA of a change of weights, and weighted sums."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_func.adapter._keys import Key, group
from lora_func.adapter._schema import refuse_other_leaves
from lora_func.files._adapters import trainable
from lora_func.modules import uncompiled
from lora_func.numerics._linalg import at_least_float32
from lora_func.runtime._layout import Site, plan_of
from lora_func.runtime._sites import dense_parameters, effective, leaves_of
from lora_func.variant import Params
from lora_func.weights._layers import dense, is_linear, matrix


class AsLoRA(NamedTuple):
    """A LoRA in place of another adapter.

    Attributes:
        params: The adapter.
        errors: Site -> what it misses of the change of the weight, relative to its norm; zero for a
            change that is but rounding.
    """

    params: Params
    errors: dict[str, float]


def to_lora(
    params: Mapping[str, Tensor],
    model: nn.Module,
    rank: int,
    *,
    tol: float = 1e-3,
    trained: bool = False,
) -> AsLoRA:
    """Find the LoRA of a rank that comes nearest to an adapter, by singular values.

    What ``Full`` trains stays as it is, but for weights of linear layers if that is asked for.

    Args:
        params: The adapter.
        model: The model it belongs to.
        rank: The rank; of a site whose matrix is smaller, the smaller side.
        tol: The largest relative error that is accepted at a site, in the Frobenius norm.
        trained: Whether weights of linear layers that ``Full`` trains become LoRAs too.

    Returns:
        The LoRA, with a scale of 1, and the error at each site.

    Raises:
        KeyError: If a key names no module or parameter of the model, or no variant.
        TypeError: If a variant has no weight, or changes a bias, for which a LoRA has no place.
        ValueError: If it is a stack, rank is none, or an error is above tol.

    Example:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Linear(4, 4)
        >>> found = lf.to_lora(lf.init(model, lf.HRA(r=2)), model, rank=2)
        >>> list(found.params)
        ['.lora.A', '.lora.B', '.lora._scale']
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank: got {rank!r}, expected a positive int")
    model = uncompiled(model)
    if refuse_other_leaves(params, model):
        raise ValueError("params: is a stack; take its adapters one by one, from unstack")
    found, errors = Params(), dict[str, float]()
    for site in plan_of(model, params).sites:
        linear = "weight" in site.keys and is_linear(model.get_submodule(site.path))
        if site.variant.parameters is not None and not (trained and linear):
            found |= {key: params[key].detach().clone() for key in site.keys.values()}
            continue
        with torch.no_grad():
            leaves, errors[site.path] = _nearest(site, params, rank)
        found |= {str(Key(site.path, "lora", name)): leaf for name, leaf in leaves.items()}
    worst = max(errors, key=errors.__getitem__, default="")
    if errors and not errors[worst] <= tol:
        raise ValueError(
            f"{worst}: a LoRA of rank {rank} misses {errors[worst]:.2e} of the change, more than "
            f"tol = {tol:g}; raise the rank or tol"
        )
    return AsLoRA(trainable(found), errors)


def _nearest(
    site: Site, params: Mapping[str, Tensor], rank: int
) -> tuple[dict[str, Tensor], float]:
    module, name = site.module(), site.parameter or "weight"
    assert module is not None
    own = dense_parameters(site.path, module)
    own[name] = at_least_float32(own[name])
    before = matrix(module, own, name)
    changed = effective(site, module, own, leaves_of(site, params))
    after = matrix(module, {**own, **changed}, name)
    if not _same(after.bias, before.bias):
        raise TypeError(
            f"{site.path}: {site.variant.name} changes the bias, for which a LoRA has no place"
        )
    U, S, Vh = torch.linalg.svd((dense(after) - dense(before)).double(), full_matrices=False)
    rounding = 16 * torch.finfo(own[name].dtype).eps * own[name].norm()
    missed = S[..., rank:].norm() / S.norm() if S.norm() > rounding else S.new_zeros(())
    root = S[..., :rank].sqrt()
    A = (root[..., None] * Vh[..., :rank, :]).to(own[name].dtype)
    B = (U[..., :rank] * root[..., None, :]).to(own[name].dtype)
    return {"A": A, "B": B, "_scale": A.new_ones(A.shape[:-2])}, missed.item()


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.to(other.dtype), other)


_LOW_RANK = ("lora", "eva", "pissa")
_NEUTRAL = {"bitfit": 0.0, "ia3": 1.0, "ia3_ff": 1.0, "shira": 0.0}
"""The variants whose change is linear in their trained leaves, and where those change nothing."""


def combine(terms: Sequence[tuple[Mapping[str, Tensor], float]]) -> Params:
    """Add adapters up, each with a weight: an adapter that changes the model by the sum.

    Low-rank terms are concatenated, exactly; variants whose change is linear in their leaves are
    summed. One adapter with weight 1 is itself, whatever it is.

    Args:
        terms: Adapters and their weights.

    Returns:
        The sum. A site that only some terms have is changed by those.

    Raises:
        KeyError: If a key is malformed or names no variant.
        TypeError: If no adapter of the variants at a site is the sum, exactly.
        ValueError: If there is no term, or an adapter is not what its variants say.

    Example:
        >>> import torch, lora_func as lf
        >>> one, two = (lf.init(torch.nn.Linear(4, 4), lf.LoRA(r=2), seed=s) for s in range(2))
        >>> lf.combine([(one, 0.5), (two, -1.0)])[".lora.A"].shape
        torch.Size([4, 4])
    """
    if not terms:
        raise ValueError("terms: got none")
    for params, _ in terms:
        refuse_other_leaves(params)
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
    return trainable(combined)


def _sum(
    site: str, here: Sequence[tuple[str, dict[str, Tensor], float]]
) -> tuple[str, dict[str, Tensor]]:
    names = {name for name, _, _ in here}
    if names <= {*_LOW_RANK}:
        pairs = [pair for _, leaves, weight in here for pair in _pairs(leaves, weight)]
        if len({A.shape[:-2] for A, _ in pairs}) > 1:
            raise ValueError(f"{site}: single adapters and stacks, or stacks of other sizes")
        A = torch.cat([A for A, _ in pairs], -2)
        return "lora", {
            "A": A,
            "B": torch.cat([B for _, B in pairs], -1),
            "_scale": A.new_ones(A.shape[:-2]),
        }
    (_, first, _), (name, *others) = here[0], names
    if others or name not in _NEUTRAL:
        raise TypeError(
            f"{site}: no adapter of {sorted(names)} is exactly a weighted sum; make LoRAs of them "
            "with to_lora"
        )
    neutral = _NEUTRAL[name]
    summed = {}
    for leaf, tensor in first.items():
        each = [leaves[leaf] for _, leaves, _ in here]
        if any(one.shape != tensor.shape for one in each):
            raise ValueError(f"{site}: {leaf} has shapes {[tuple(one.shape) for one in each]}")
        if not leaf.startswith("_"):
            moved = [weight * (t - neutral) for t, (_, _, weight) in zip(each, here, strict=True)]
            summed[leaf] = neutral + torch.stack(moved).sum(0)
        elif all(torch.equal(one, tensor) for one in each):
            summed[leaf] = tensor.clone()
        else:
            raise TypeError(
                f"{site}: adapters of {name} with other {leaf} have no sum of the "
                "same kind; make LoRAs of them with to_lora"
            )
    return name, summed


def _pairs(leaves: Mapping[str, Tensor], weight: float) -> list[tuple[Tensor, Tensor]]:
    scale = weight * leaves["_scale"][..., None, None]
    pairs = [(leaves["A"], scale * leaves["B"])]
    if "_A0" in leaves:
        pairs.append((leaves["_A0"], -scale * leaves["_B0"]))
    return [(A, B.to(A.dtype)) for A, B in pairs]
