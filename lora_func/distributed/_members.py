"""The members of a sweep over the ranks: who trains which, and all of them again."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from lora_func.adapter import as_trainable
from lora_func.variant import Params

Member = TypeVar("Member")


def share(members: Sequence[Member], group: Any = None) -> list[tuple[int, Member]]:
    """Return the members of a sweep that belong to this rank.

    Args:
        members: What describes each member, such as a config or a seed; the same on all ranks.
        group: The ranks; None for all.

    Returns:
        (index, member) of each, in order: neighbours on one rank, and as many on each rank as on
        another, or one more.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    first, last = (len(members) * r // ranks for r in (rank, rank + 1))
    return [(index, members[index]) for index in range(first, last)]


def gathered(mine: Sequence[Mapping[str, Tensor]], group: Any = None) -> list[Params]:
    """Return the adapters of all ranks on every rank.

    Args:
        mine: The adapters of this rank, in the order of ``share``; there may be none.
        group: The ranks; None for all.

    Returns:
        All adapters in order, in the form that ``init`` gives; those of other ranks on the CPU.

    Raises:
        TypeError: If mine is a single adapter or stack.
    """
    if isinstance(mine, Mapping):
        raise TypeError("mine: got a mapping, expected a list of adapters; pass unstack(stack)")
    sent = [{key: leaf.detach().cpu() for key, leaf in one.items()} for one in mine]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, sent, group=group)
    rank = dist.get_rank(group)
    return [
        as_trainable(one)
        for r, of_rank in enumerate(found)
        for one in (mine if r == rank else of_rank)
    ]
