"""When triplets are pruned, and how many stay."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_func.checks import check_count, check_number
from lora_func.rules._leaves import check_one_kind
from lora_func.rules.adalora._scores import (
    adalora_sites,
    allocate,
    importance,
    mask,
    triplet_scores,
)
from lora_func.variant import Params


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

    Examples:
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
    before = -1 if state is None else int(state["step"])
    if step != before + 1:
        given = "without a state" if state is None else f"after {before}"
        raise ValueError(f"step: got {step} {given}; call update after each step, from 0 on")
    sites = adalora_sites(params)
    check_one_kind({keys["E"]: params[keys["E"]] for keys in sites.values()})
    there = sum(params[keys["A"]].detach().any(-1).sum(-1) for keys in sites.values())
    starts, target = torch.as_tensor(there), schedule.target_r * len(sites)
    if target >= starts.min():
        raise ValueError(
            f"target_r: {schedule.target_r} at each of {len(sites)} sites is no fewer than the "
            f"{int(starts.min())} triplets that there are"
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
        keep = _kept(triplet_scores(params, made), step, schedule, starts, target)
        if step == schedule.last:
            made = {f"{site}/keep": own for site, own in keep.items()}
        return mask(params, keep), {**made, **at}


def _kept(
    scores: Mapping[str, Tensor], step: int, schedule: Schedule, starts: Tensor, target: int
) -> dict[str, Tensor]:
    """The masks of one step; of a stack each adapter has a budget of its own."""
    every = torch.cat([*scores.values()], -1)
    if not bool(every.any(-1).all()):
        raise ValueError(
            f"step {step}: every score of an adapter is zero, so that all of its triplets would "
            "go; its gradients are zero, or too small for their dtype"
        )
    kept = [budget(step, schedule, start, target) for start in starts.flatten().tolist()]
    return allocate(scores, torch.tensor(kept).reshape(starts.shape))
