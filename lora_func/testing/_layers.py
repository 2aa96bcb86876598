"""A linear layer with an adapter, on which the laws are checked."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.variant import Variant
from lora_func.weights import Affine, Weight, dense


@dataclass(frozen=True, repr=False)
class Layer:
    """A frozen linear layer and an adapter, as arguments for the functions of a variant.

    Attributes:
        module: The frozen layer.
        W: Its weight (d_out, d_in) and its bias.
        variant: The variant.
        leaves: The leaves of the adapter.
        x: Activations, shape (*batch, d_in).
        sizes: What the layer was made from, by which a counterexample is shown.
    """

    module: nn.Linear
    W: Affine
    variant: Variant
    leaves: dict[str, Tensor]
    x: Tensor
    sizes: Mapping[str, Any]

    def __repr__(self) -> str:
        return ", ".join(
            f"{name}={str(value).removeprefix('torch.')}" for name, value in self.sizes.items()
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would show all fields

    @property
    def trained(self) -> dict[str, Tensor]:
        """The leaves that are no constants."""
        return {name: leaf for name, leaf in self.leaves.items() if not name.startswith("_")}

    @property
    def bias(self) -> Tensor | None:
        """The adapted bias."""
        return self.variant.bias(self.W.bias, self.leaves) if self.variant.bias else self.W.bias

    def apply(self, leaves: Mapping[str, Tensor] | None = None, x: Any = None) -> Tensor:
        """Run the activation view.

        Args:
            leaves: Leaves in place of the layer's own; the others stay.
            x: Activations in place of the layer's own.

        Returns:
            Shape (*batch, d_out).
        """
        own = {**self.leaves, **(leaves or {})}
        return self.variant.apply(self.W, own, self.x if x is None else x)

    def frozen(self) -> Tensor:
        """Run the layer without the adapter."""
        output: Tensor = self.module(self.x)
        return output

    def weight(self, W: Weight | None = None) -> Tensor:
        """Run the weight view; without one the frozen weight is returned."""
        W = self.W if W is None else W
        return dense(W) if self.variant.weight is None else self.variant.weight(W, self.leaves)

    def with_leaves(self, leaves: Mapping[str, Tensor]) -> "Layer":
        """Return the layer with other leaves; those that are not named stay."""
        return replace(self, leaves={**self.leaves, **leaves})

    def params(self) -> dict[str, Tensor]:
        """Return the adapter of the layer as a model: the keys of its leaves have an empty path."""
        return {f".{self.variant.name}.{name}": leaf for name, leaf in self.leaves.items()}


class Layers(nn.ModuleDict):
    """Parallel layers; each has its own input."""

    def forward(self, **inputs: Tensor) -> Tensor:
        """Run each layer on its input, and join the outputs."""
        return torch.cat([self[name](x).flatten() for name, x in inputs.items()])


def random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Draw normal numbers; the same for every dtype, up to its rounding."""
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def random_linear(
    d_in: int, d_out: int, bias: bool, dtype: torch.dtype, generator: torch.Generator
) -> nn.Linear:
    """Make a frozen layer with normal numbers."""
    module = nn.Linear(d_in, d_out, bias=bias).to(dtype).requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(random_like(parameter, generator))
    return module


def random_stack(
    layer: Layer, adapters: int, seed: int
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Draw the trained leaves of several adapters of one layer.

    Args:
        layer: The layer, whose constants all adapters have.
        adapters: How many.
        seed: Of their trained leaves.

    Returns:
        The leaves of each adapter, and the same leaves stacked.
    """
    generator = torch.Generator().manual_seed(seed)
    each = [
        {**layer.leaves, **{k: random_like(v, generator) for k, v in layer.trained.items()}}
        for _ in range(adapters)
    ]
    return each, {name: torch.stack([leaves[name] for leaves in each]) for name in layer.leaves}
