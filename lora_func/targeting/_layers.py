"""Layers of a stack, by number."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn


class Place(NamedTuple):
    """The place of a module in a stack of layers.

    Attributes:
        layer: Its index in the stack.
        depth: The number of layers of the stack.
    """

    layer: int
    depth: int


class Layers:
    """The stacks of layers of a model.

    A stack of layers is an ``nn.ModuleList``, or another numbered container of several children of
    one class. If stacks nest, the outermost counts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._depths = {path: _depth(module) for path, module in model.named_modules()}

    def place_of(self, site: str) -> Place | None:
        """Return the place of a module or parameter; None if it stands in no stack."""
        parts = site.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                depth = self._depths.get(".".join(parts[:i]))
                if depth is not None:
                    return Place(int(part), depth)
        return None

    def layer_of(self, site: str) -> int | None:
        """Return the index of the layer of a module or parameter; None if it stands in no stack."""
        place = self.place_of(site)
        return None if place is None else place.layer

    def select(self, layers: Iterable[int], sites: Sequence[str]) -> set[str]:
        """Choose the sites in some layers.

        Args:
            layers: Indices within each stack; negative indices count from its end.
            sites: Paths of modules or parameters.

        Returns:
            The sites in these layers.

        Raises:
            ValueError: If a layer has no site.
        """
        places = {site: place for site in sites if (place := self.place_of(site)) is not None}
        chosen: set[str] = set()
        for layer in layers:
            here = {
                site
                for site, (index, depth) in places.items()
                if index == (layer if layer >= 0 else layer + depth)
            }
            if not here:
                there = sorted({place.layer for place in places.values()})
                raise ValueError(
                    f"layers: no site in layer {layer}; there are sites in layers {there}"
                )
            chosen |= here
        return chosen


def _depth(module: nn.Module) -> int | None:
    """The number of layers, if a module is a stack of layers."""
    layers = [child for name, child in module.named_children() if name.isdigit()]
    alike = len(layers) > 1 and len({type(layer) for layer in layers}) == 1
    return len(layers) if isinstance(module, nn.ModuleList) or alike else None
