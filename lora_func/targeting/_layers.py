"""Layers of a stack, by number."""

from collections.abc import Iterable, Sequence

from torch import nn


def layer_of(model: nn.Module, site: str) -> int | None:
    """Tell which layer a module stands in.

    A stack of layers is an ``nn.ModuleList``, or another numbered container of several children
    that are all of one class; where stacks nest, the outermost counts.

    Args:
        model: The model.
        site: Path of a module in it.

    Returns:
        The index, or None outside any stack.
    """
    place = _place(model, site)
    return None if place is None else place[0]


def sites_in_layers(model: nn.Module, layers: Iterable[int], sites: Sequence[str]) -> set[str]:
    """Choose the sites in some layers.

    Args:
        model: The model.
        layers: Indices within each stack; negative ones count from its end.
        sites: Paths of modules.

    Returns:
        Those in the layers.

    Raises:
        ValueError: If there is no site in one of the layers.
    """
    places = {site: place for site in sites if (place := _place(model, site)) is not None}
    chosen: set[str] = set()
    for layer in layers:
        here = {
            s for s, (i, depth) in places.items() if i == (layer if layer >= 0 else layer + depth)
        }
        if not here:
            there = sorted({i for i, _ in places.values()})
            raise ValueError(f"layers: no site in layer {layer}; there are sites in layers {there}")
        chosen |= here
    return chosen


def _place(model: nn.Module, site: str) -> tuple[int, int] | None:
    """A module's index in its stack, and the number of layers of that stack."""
    parts = site.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            stack = model.get_submodule(".".join(parts[:i]))
            layers = [child for name, child in stack.named_children() if name.isdigit()]
            alike = len(layers) > 1 and len({type(layer) for layer in layers}) == 1
            if isinstance(stack, nn.ModuleList) or alike:
                return int(part), len(layers)
    return None
