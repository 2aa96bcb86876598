"""Adapters on tensor-parallel layers: their leaves as DTensors on the mesh of the weight."""

from typing import Any

import torch
from torch import Tensor

from lora_func.compat import inner_forward_cell, tree_map_only
from lora_func.numerics import DROPOUT
from lora_func.runtime._leaves import SiteLeaves
from lora_func.runtime._site import Site
from lora_func.variant import prepare_sites
from lora_func.weights import Affine


class InnerForward:
    """The place of a patch: where transformers' tensor parallelism keeps a module's own forward.

    Attributes:
        outer: What stands on the instance, and calls the inner one between its collectives.
    """

    def __init__(self, outer: Any, cell: Any) -> None:
        self.outer = outer
        self._cell = cell

    def get(self, name: str, default: Any) -> Any:
        return self._cell.cell_contents

    def __setitem__(self, name: str, value: Any) -> None:
        self._cell.cell_contents = value

    def run_recorded(self, *args: Any, **kwargs: Any) -> Any:
        """Call it as in training: without gradients it runs the inner one on parts of weights."""
        if torch.is_grad_enabled():
            return self.outer(*args, **kwargs)
        with torch.enable_grad():
            output = self.outer(*args, **kwargs)
        return tree_map_only(Tensor, Tensor.detach, output)


def inner_forward(found: Any) -> InnerForward | None:
    """Return the place of what transformers' tensor parallelism calls; None for other forwards."""
    place = getattr(found, "__self__", None)
    if isinstance(place, InnerForward):
        return place
    cell = inner_forward_cell(found)
    return None if cell is None else InnerForward(found, cell)


def lifted(site: Site, leaves: SiteLeaves, W: Affine, x: Tensor) -> dict[str, Tensor]:
    """Bring a site's leaves onto the devices on which its weight is spread.

    Each leaf is sharded where the weight is, if it has the weight's axis; else every device has all
    of it. Its gradient is whole on every device.

    Args:
        site: The site.
        leaves: Its leaves: plain tensors, equal on all devices.
        W: Its weight, a DTensor.
        x: Its activations.

    Returns:
        The leaves as DTensors, with what was prepared from them.

    Raises:
        TypeError: If there is dropout.
    """
    if DROPOUT in leaves.raw:
        raise TypeError(
            f"{site.path}: has dropout, which ranks of a tensor parallel layer would draw apart; "
            f"leave {site.keys[DROPOUT]!r} out of the adapter, or call eval() on the module"
        )
    ready = leaves.suited(x)
    if leaves.dtype != x.dtype:  # linear algebra has no rules for DTensors
        (ready,) = prepare_sites(site.variant, [{**leaves.raw}], (), W.shape, x.dtype)
    spread: Any = W.weight
    return {name: _lifted(site, name, leaf, spread) for name, leaf in ready.items()}


def _lifted(site: Site, name: str, leaf: Tensor, weight: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = weight.device_mesh
    placements: list[Any] = [Replicate()] * mesh.ndim
    found: Any = DTensor.from_local(leaf, mesh, placements, run_check=False)
    words = site.variant.axes.get(name, ((),))[0]
    for i, placement in enumerate(weight.placements):
        side = {0: "d_out", 1: "d_in"}.get(getattr(placement, "dim", -1))
        if side in words:
            placements[i] = Shard(words.index(side) - len(words) + leaf.ndim)
    if any(placement.is_shard() for placement in placements):
        found = found.redistribute(mesh, placements)
    lifted_leaf: Tensor = found
    return lifted_leaf
