"""Stacks whose axis of adapters is spread over devices: each device runs its own part."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lora_func.compat import tree_map_only
from lora_func.modules import is_spread
from lora_func.sweep._batching import batch_of
from lora_func.sweep._fold import Sweep


def is_spread_over_adapters(stacks: Sequence[Mapping[str, Tensor]]) -> bool:
    """True if stacks hold DTensors."""
    return any(is_spread(leaf) for stack in stacks for leaf in stack.values())


def run_own_part(sweep: Sweep, run: Callable[[Sweep], Any]) -> Any:
    """Run the adapters of a stack that lie on this device.

    Args:
        sweep: The adapters: one stack.
        run: Runs a part of them.

    Returns:
        The results of all adapters, spread as the stack is.

    Raises:
        ValueError: If leaves are spread otherwise, there are other stacks, or a device has no
            adapter.
    """
    from torch.distributed.tensor import DTensor, Shard

    leaves: dict[str, Any] = {**sweep.stacks[0]}
    mesh = next(leaf for leaf in leaves.values() if is_spread(leaf)).device_mesh
    alike = all(is_spread(leaf) and leaf.placements == (Shard(0),) for leaf in leaves.values())
    adapters = sweep.size
    most = -(-adapters // mesh.size())
    if len(sweep.stacks) > 1 or not alike or adapters <= most * (mesh.size() - 1):
        raise ValueError(
            f"stacked: {adapters} adapters are spread over {mesh.size()} devices; a spread stack "
            "comes alone, all its leaves are DTensors with (Shard(0),), the axis of the adapters, "
            "and each device has some"
        )
    first = dist.get_rank(mesh.get_group()) * most
    own = {key: leaf.to_local() for key, leaf in leaves.items()}
    size = min(most, adapters - first)
    batch = batch_of(sweep.batch, sweep.batched, slice(first, first + size))
    found = run(sweep._replace(stacks=[own], sizes=(size,), batch=batch))

    def spread(part: Tensor) -> Any:
        shape = torch.Size((adapters, *part.shape[1:]))
        stride = part.new_empty(shape, device="meta").stride()
        return DTensor.from_local(
            part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )

    return tree_map_only(Tensor, spread, found)
