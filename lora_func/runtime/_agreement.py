"""What the ranks of a sharded base agree on before they run it.

Each pass of a model that FSDP shards gathers its weights, layer by layer, in which all ranks take
part: forwards, and backwards as far down as a layer is adapted.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_func.modules import inner_model, is_spread, sharding
from lora_func.runtime._layout import layout_of


def is_sharded(model: nn.Module) -> bool:
    """True if FSDP2 or FSDP1 shards modules of a model."""
    found = sharding(model)
    return bool(found.gathered or found.flattened)


@contextmanager
def refused_together(model: nn.Module) -> Iterator[None]:
    """Refuse a call on all ranks of a sharded base if one refuses it, so that none waits for it.

    Raises:
        RuntimeError: If the block was refused on another rank only.
    """
    try:
        yield
    except Exception:
        largest(model, [1])
        raise
    if largest(model, [0]) == [1]:
        raise RuntimeError("another rank refused its call; its error says why")


def check_same_depth(model: nn.Module, adapters: Iterable[Mapping[str, Tensor]]) -> None:
    """Check that the backward passes of all ranks end at the same layer of a sharded base.

    Args:
        model: The model; without FSDP nothing is checked.
        adapters: The adapters of this rank, or stacks of them.

    Raises:
        ValueError: If they do not: ranks would gather different layers, and take one for another.
    """
    if not is_sharded(model):
        return
    sites = (site for one in adapters for site in layout_of(inner_model(model), one).sites)
    changed = {id(part) for site in sites for part in site.module.modules()}
    order = [id(module) in changed for module in model.modules()]
    lowest = order.index(True) if changed else len(order)
    highest, negative = largest(model, [lowest, -lowest])
    if highest != -negative:
        raise ValueError(
            "params: the lowest adapted layer is not the same on all ranks, over which the base is "
            "sharded; adapt the same layers everywhere"
        )


def largest(model: nn.Module, numbers: list[int]) -> list[int]:
    """Return the largest of the ranks' numbers, each by its place.

    Args:
        model: The model; without FSDP the numbers stay what they are.
        numbers: Those of this rank.

    Returns:
        What the rank with the most has.
    """
    if not is_sharded(model):
        return numbers
    spread: Any = next((p for p in model.parameters() if is_spread(p)), None)
    mesh = None if spread is None else spread.device_mesh
    found = torch.tensor(numbers, device="cpu" if mesh is None else mesh.device_type)
    groups = [None] if mesh is None else [mesh.get_group(i) for i in range(mesh.ndim)]
    for group in groups:
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    most: list[int] = found.tolist()
    return most
