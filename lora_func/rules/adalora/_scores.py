"""Scores of singular triplets, and masks over all sites of an adapter."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_func.adapter import as_trainable, group
from lora_func.rules._leaves import check_one_kind, wide
from lora_func.variant import Params

_LEAVES = ("A", "B", "E")


def adalora_sites(params: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Site -> {leaf: key}, for the sites of AdaLoRA."""
    found = {site: keys for (site, name), keys in group(params).items() if name == "adalora"}
    if not found:
        raise ValueError("params: no site is adapted by AdaLoRA")
    return found


def importance(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    state: Mapping[str, Tensor] | None = None,
    *,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> Params:
    """Update the running means of ``|p g|`` and of its variation.

    Args:
        params: The adapter, after the optimizer's step.
        grads: Its gradients, from before that step.
        state: The state so far; None at the first step.
        beta1: The decay of the mean I.
        beta2: The decay of the mean of ``||p g| - I|``, with the new I.

    Returns:
        "{key}/mean" and "{key}/variation" of each trained leaf.

    Raises:
        ValueError: If no site is adapted by AdaLoRA, or a leaf has no gradient.
    """
    found: Params = {}
    for keys in adalora_sites(params).values():
        for key in (keys[leaf] for leaf in _LEAVES):
            if key not in grads:
                raise ValueError(f"{key}: has no gradient; AdaLoRA scores every trained leaf")
            size = (wide(params[key]) * wide(grads[key])).abs()
            zero = torch.zeros_like(size)
            mean, variation = (
                zero if state is None else state.get(f"{key}/{name}", zero)
                for name in ("mean", "variation")
            )
            mean = beta1 * mean + (1 - beta1) * size
            found[f"{key}/mean"] = mean
            found[f"{key}/variation"] = beta2 * variation + (1 - beta2) * (size - mean).abs()
    return found


def triplet_scores(params: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Score each triplet: that of E, and the means of those of its row of A and column of B.

    Args:
        params: The adapter.
        state: What ``importance`` returned.

    Returns:
        Site -> scores (..., r).
    """
    scores = {}
    for site, keys in adalora_sites(params).items():
        A, B, E = (state[f"{keys[n]}/mean"] * state[f"{keys[n]}/variation"] for n in _LEAVES)
        scores[site] = E + (A.mean(-1) + B.mean(-2))
    return scores


def allocate(scores: Mapping[str, Tensor], kept: int | Tensor) -> dict[str, Tensor]:
    """Keep the triplets with the highest scores, over all sites of an adapter.

    Args:
        scores: Site -> scores (..., r).
        kept: How many may stay; for a stack possibly one number for each adapter, shape (K,).

    Returns:
        Site -> True for the triplets that stay, (..., r). Equal scores at the border all go.

    Raises:
        ValueError: If kept is negative, or above the number of triplets.
    """
    check_one_kind(scores)
    every = torch.cat([*scores.values()], -1)
    n = every.shape[-1]
    below = n - torch.as_tensor(kept, device=every.device)
    if bool((below < 0).any() or (below > n).any()):
        raise ValueError(f"kept: got {kept}, expected at least 0 and at most {n}")
    border = every.sort(-1).values
    border = torch.cat([torch.full_like(border[..., :1], -torch.inf), border], -1)
    border = border.gather(-1, below.expand(border.shape[:-1]).unsqueeze(-1))
    return {site: own > border for site, own in scores.items()}


def mask(params: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> Params:
    """Set E of the triplets that do not stay to zero; A and B keep their values.

    Args:
        params: The adapter; it does not change.
        keep: Site -> True for the triplets that stay.

    Returns:
        The adapter; the other leaves are the same tensors.
    """
    found = {}
    for site, keys in adalora_sites(params).items():
        E = params[keys["E"]].detach()
        found[keys["E"]] = torch.where(keep[site], E, torch.zeros_like(E))
    return {**params, **as_trainable(found)}


def orthogonality(params: Mapping[str, Tensor]) -> Tensor:
    """Compute the penalty on factors that are not orthogonal, for the loss.

    The mean over all A and B of ``‖A Aᵀ - I‖`` and ``‖Bᵀ B - I‖``, which is not squared, as in the
    codes; eq. 4 of the paper squares it. The codes weigh it with 0.5.

    Args:
        params: The adapter.

    Returns:
        Shape (), or (K,) of a stack.

    Raises:
        ValueError: If no site is adapted by AdaLoRA.
    """
    apart, sites = [], adalora_sites(params)
    check_one_kind({keys["A"]: params[keys["A"]] for keys in sites.values()})
    for keys in sites.values():
        A, B = params[keys["A"]], params[keys["B"]]
        is_used = (A.detach().any(-1) | B.detach().any(-2)).to(A.dtype)  # not a padded rank
        eye = is_used.diag_embed()
        apart += [(A @ A.mT - eye).norm(dim=(-2, -1)), (B.mT @ B - eye).norm(dim=(-2, -1))]
    return torch.stack(apart).mean(0)
