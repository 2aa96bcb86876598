"""AdaLoRA's schedule: scores of singular triplets, a budget over all sites, and masks.

Each function takes leaves of ``lf.AdaLoRA``, of one adapter or of a stack of K that train in
lockstep; the K have scores and masks of their own. ``update`` does all of it after an optimizer's
step.

References:
    https://arxiv.org/abs/2303.10512, eq. 8-11 and alg. 1. Code: QingruZhang/AdaLoRA,
    huggingface/peft ``tuners/adalora/layer.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_func.adapter import as_trainable, group
from lora_func.checks import check_count, check_number
from lora_func.variant import Params

__all__ = [
    "Schedule",
    "allocate",
    "budget",
    "importance",
    "mask",
    "orthogonality",
    "triplet_scores",
    "update",
]

_LEAVES = ("A", "B", "E")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When triplets are pruned, and how many stay.

    Attributes:
        total: The number of steps of the training.
        target_r: The rank that stays, on average over the sites.
        tinit: Steps at the start in which nothing is pruned.
        tfinal: Steps at the end in which the mask stays.
        delta_t: Steps from one mask to the next.
        beta1: The decay of the running mean of the sensitivity.
        beta2: The decay of the running mean of its variation.
    """

    total: int
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        for name in ("total", "target_r", "delta_t"):
            check_count(name, getattr(self, name))
        for name in ("tinit", "tfinal"):
            check_count(name, getattr(self, name), least=0)
        for name in ("beta1", "beta2"):
            check_number(name, getattr(self, name), above=0)
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected below 1")
        if self.tinit + self.tfinal >= self.total:
            raise ValueError(
                f"tinit: {self.tinit} + tfinal {self.tfinal} leave no step of {self.total} to prune"
            )

    @property
    def last(self) -> int:
        """The step of the last mask."""
        return self.total - self.tfinal


def _sites(params: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
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
    for keys in _sites(params).values():
        for key in (keys[leaf] for leaf in _LEAVES):
            if key not in grads:
                raise ValueError(f"{key}: has no gradient; AdaLoRA scores every trained leaf")
            size = (params[key].detach() * grads[key]).abs()
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
    for site, keys in _sites(params).items():
        A, B, E = (state[f"{keys[n]}/mean"] * state[f"{keys[n]}/variation"] for n in _LEAVES)
        scores[site] = E + (A.mean(-1) + B.mean(-2))
    return scores


def budget(step: int, schedule: Schedule, start: int, target: int) -> int:
    """Return how many triplets may stay at a step, falling as a cubic from start to target.

    Args:
        step: The step, from 0.
        schedule: The schedule.
        start: All triplets of one adapter.
        target: Those that stay in the end.

    Returns:
        The number.
    """
    if step <= schedule.tinit:
        return start
    if step > schedule.last:
        return target
    rest = 1 - (step - schedule.tinit) / (schedule.last - schedule.tinit)
    return int((start - target) * rest**3 + target)


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
    for site, keys in _sites(params).items():
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
    apart = []
    for keys in _sites(params).values():
        A, B = params[keys["A"]], params[keys["B"]]
        eye = torch.eye(A.shape[-2], dtype=A.dtype, device=A.device)
        apart += [(A @ A.mT - eye).norm(dim=(-2, -1)), (B.mT @ B - eye).norm(dim=(-2, -1))]
    return torch.stack(apart).mean(0)


def update(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    state: Mapping[str, Tensor] | None,
    step: int,
    schedule: Schedule,
) -> tuple[Params, Params]:
    """Score the triplets and mask those above the budget, after the optimizer's step.

    Call it after each step, with the gradients of that step, and write the result to the leaves.

    Args:
        params: The adapter, after the optimizer's step; it does not change.
        grads: Its gradients, from before that step.
        state: What the step before returned; None at the first one.
        step: The step; each is one above the one before.
        schedule: The schedule.

    Returns:
        (params, state).

    Raises:
        ValueError: If a step was left out, target_r is no smaller than the mean rank, or a leaf has
            no gradient.

    Example:
        >>> import torch, lora_func as lf
        >>> from lora_func.rules import adalora
        >>> params = lf.init(torch.nn.Linear(6, 5), lf.AdaLoRA(r=4))
        >>> grads = {key: torch.randn_like(leaf) for key, leaf in lf.partition(params)[0].items()}
        >>> params = {**params, ".adalora.E": torch.ones(4)}
        >>> schedule = adalora.Schedule(total=2, target_r=1)
        >>> state = None
        >>> for step in range(3):
        ...     params, state = adalora.update(params, grads, state, step, schedule)
        >>> int(params[".adalora.E"].count_nonzero())
        1
    """
    if state is not None and step != int(state["step"]) + 1:
        raise ValueError(
            f"step: got {step} after {int(state['step'])}; call update after each step"
        )
    sites = _sites(params)
    start = sum(params[keys["E"]].shape[-1] for keys in sites.values())
    target = schedule.target_r * len(sites)
    if target >= start:
        raise ValueError(
            f"target_r: {schedule.target_r} at each of {len(sites)} sites is no fewer than the "
            f"{start} triplets that there are"
        )
    at = {"step": torch.tensor(step)}
    with torch.no_grad():
        if step > schedule.last:
            keep = {site: (state or {})[f"{site}/keep"] for site in sites}
            return mask(params, keep), {**(state or {}), **at}
        made = {} if state is None else dict(state)
        if step < schedule.last:
            betas = {"beta1": schedule.beta1, "beta2": schedule.beta2}
            made |= importance(params, grads, state, **betas)
        is_time = step > schedule.tinit and step % schedule.delta_t == 0
        if not is_time and step != schedule.last:
            return dict(params), {**made, **at}
        keep = allocate(triplet_scores(params, made), budget(step, schedule, start, target))
        if step == schedule.last:
            made = {f"{site}/keep": own for site, own in keep.items()}
        return mask(params, keep), {**made, **at}
