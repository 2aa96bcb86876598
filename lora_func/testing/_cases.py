"""What the laws are told about an adapter method: a table of cases, one for each configuration."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from itertools import product
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lora_func.adapter import parse
from lora_func.configs import AdapterConfig
from lora_func.initialization import init
from lora_func.testing._layers import Layer, Layers, random_like, random_linear
from lora_func.variant import Params, Variant
from lora_func.variants import by_config
from lora_func.weights import affine

Fit: TypeAlias = Callable[[int, int, int], tuple[int, int, int]]
"""Maps any (d_in, d_out, r) to sizes that a method accepts."""

Start: TypeAlias = Literal["exact", "close", "elsewhere"]


@dataclass(frozen=True, repr=False)
class Subject(ABC):
    """An adapter method on which laws are checked: a ``Case``, or a module of another package.

    Attributes:
        name: Shown as the test's id.
        dead: Leaves whose gradient is exactly zero at the start, by the formula; None if that is
            not known.
        bias: True if the layer needs a bias, False if it must have none, None if both work.
        fit: Maps any (d_in, d_out, r) to sizes that the method accepts.
        start: The initial output, against the frozen layer's: "exact", "close" (8 eps of the
            coarser dtype of layer and leaves) or "elsewhere".
        jumps: True if the first optimizer step has a fixed size, whatever the learning rate.
        refuses_zero_rows: True if ``init`` refuses weights with rows of zeros.
        batch_axes: The least and the largest number of axes that activations have before the last.
        detached: Leaves whose gradient leaves a part out by the formula, as DoRA's does that of the
            norm.
    """

    name: str
    _: KW_ONLY
    dead: frozenset[str] | None = frozenset()
    bias: bool | None = None
    fit: Fit = lambda d_in, d_out, r: (d_in, d_out, r)
    start: Start = "exact"
    jumps: bool = False
    refuses_zero_rows: bool = False
    batch_axes: tuple[int, int] = (0, 3)
    detached: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return self.name

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would show all fields

    def layer(
        self,
        d_in: int = 6,
        d_out: int = 5,
        r: int = 2,
        bias: bool = True,
        batch: tuple[int, ...] = (3,),
        seed: int = 0,
        scrambled: bool = False,
        dtype: torch.dtype = torch.float64,
        leaf_dtype: torch.dtype | None = None,
        zero_rows: bool = False,
    ) -> Layer:
        """Make a random layer with an adapter.

        Args:
            d_in: The width of the input, before ``fit``.
            d_out: The width of the output, before ``fit``.
            r: The rank, before ``fit``.
            bias: Whether the layer has a bias, if the method leaves that open.
            batch: The shape of the activations without their last axis.
            seed: From which all numbers follow.
            scrambled: Whether trained leaves are random; else they are freshly initialized.
            dtype: Of the layer and the activations.
            leaf_dtype: Of the leaves; by default the same.
            zero_rows: Whether the first half of the rows of the weight is zero.

        Returns:
            The layer.
        """
        generator = torch.Generator().manual_seed(seed)
        d_in, d_out, r = self.fit(d_in, d_out, r)
        bias = bias if self.bias is None else self.bias
        module = random_linear(d_in, d_out, bias, dtype, generator)
        if zero_rows:
            module.weight[: d_out // 2] = 0
        x = torch.randn(*batch, d_in, generator=generator, dtype=torch.float64).to(dtype)
        sizes = {"d_in": d_in, "d_out": d_out, "r": r, "bias": bias, "batch": batch, "seed": seed}
        sizes |= {"scrambled": scrambled, "dtype": dtype, "leaf_dtype": leaf_dtype or dtype}
        layer = self.adapted(module, x, sizes)
        drawn = {name: random_like(leaf, generator) for name, leaf in layer.trained.items()}
        return layer.with_leaves(drawn) if scrambled else layer

    @property
    @abstractmethod
    def has_weight(self) -> bool:
        """True if the method is affine in x, so that it has a weight view."""

    @abstractmethod
    def adapted(self, module: nn.Linear, x: Tensor, sizes: Mapping[str, Any]) -> Layer:
        """Give a layer a fresh adapter.

        Args:
            module: The frozen layer.
            x: Its activations.
            sizes: As in ``Layer``.

        Returns:
            The layer with the adapter.
        """


@dataclass(frozen=True, repr=False)
class Case(Subject):
    """One configuration of a registered variant.

    Attributes:
        config: Builds the config from a rank, which methods without a rank ignore.
        data: The calibration data: "inputs", "gradients", "pairs" or None.
    """

    config: Callable[[int], AdapterConfig]
    data: str | None = field(default=None, kw_only=True)

    @property
    def variant(self) -> Variant:
        """The variant of the config."""
        return by_config(self.config(2))

    @property
    def is_adapter(self) -> bool:
        """True if the variant adapts layers; False if it trains the parameters directly."""
        return self.variant.parameters is None

    @property
    def has_weight(self) -> bool:
        """True if the variant has a weight view."""
        return self.variant.weight is not None

    def adapted(self, module: nn.Linear, x: Tensor, sizes: Mapping[str, Any]) -> Layer:
        """Give a layer a fresh adapter, as ``Subject.adapted`` says."""
        params = self.params(module, sizes["r"], seed=sizes["seed"], dtype=sizes["leaf_dtype"])
        leaves = {parse(key).leaf: leaf.detach() for key, leaf in params.items()}
        variant = by_config(self.config(sizes["r"]))
        return Layer(module, affine(module), variant, leaves, x, sizes)

    def params(self, module: nn.Linear | Layers, r: int, **settings: Any) -> Params:
        """Make an adapter, calibrated on random data if the case needs data.

        Args:
            module: A layer, or several.
            r: The rank.
            **settings: Passed to ``init``.

        Returns:
            What ``init`` makes.
        """

        def batch(seed: int) -> Tensor | dict[str, Tensor]:
            if isinstance(module, Layers):
                return {name: inputs(layer, seed) for name, layer in module.items()}
            return inputs(module, seed)

        def inputs(layer: Any, seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            shape = torch.empty(4, 5, layer.in_features, dtype=layer.weight.dtype)
            return random_like(shape, generator) + seed

        pairs = self.data == "pairs"
        data = [(batch(1), batch(0)) if pairs else batch(seed) for seed in range(2)]
        return init(
            module,
            self.config(r),
            data=data if self.data else None,
            loss_fn=lambda y, _: y.double().square().sum(),
            **settings,
        )


def find_fit(make: Callable[[nn.Linear, int], object], bias: bool | None) -> Fit:
    """Find sizes that a method accepts, by trying it on layers.

    Args:
        make: Gives a layer an adapter of a rank.
        bias: As in ``Subject``.

    Returns:
        The simplest map that fits.

    Raises:
        ValueError: If no map that is tried fits.
    """
    ranks: tuple[Callable[[int], int], ...] = (lambda r: r, lambda r: 2 * r, lambda r: 1)
    generator, error = torch.Generator().manual_seed(0), None
    for choice in product((1, 2, 4, 8, 16, 32, 64), (0, 1, 2), ranks):
        fit = _scaled(*choice)
        try:
            for sizes in ((1, 1, 1), (3, 2, 1), (2, 5, 2), (6, 5, 2)):
                d_in, d_out, r = fit(*sizes)
                layer = random_linear(d_in, d_out, bias is not False, torch.float32, generator)
                make(layer, r)
        except Exception as failed:
            error = error or failed
        else:
            return fit
    raise ValueError(f"fit: no sizes were found that the method accepts, pass fit; {error}")


def _scaled(factor: int, more: int, rank: Callable[[int], int]) -> Fit:
    return lambda d_in, d_out, r: (factor * d_in + more, factor * d_out + more, rank(r))
