"""The table of cases that every law runs on: adding a variant means adding its rows here."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import lora_func as lf
from lora_func._config import AdapterConfig
from lora_func._keys import parse
from lora_func._weight import Affine, affine
from lora_func.variants import by_config
from lora_func.variants._template import Template


@dataclass(frozen=True)
class Case:
    """One configuration of one variant.

    Attributes:
        name: Shown as the test's id.
        config: Makes the config for a layer, given the rank to use where there is one.
        dead: Leaves whose gradient is exactly zero at the start, as the mathematics says.
        bias: Whether the layer may, must or must not have a bias (None, True, False).
    """

    name: str
    config: Callable[[int], AdapterConfig]
    dead: frozenset[str] = field(default_factory=frozenset)
    bias: bool | None = None

    def __repr__(self) -> str:
        return self.name


CASES = [
    Case("full", lambda r: lf.Full(target_parameters=".*")),
    Case("full-weight", lambda r: lf.Full(target_parameters="weight")),
    Case("full-bias", lambda r: lf.Full(target_parameters="bias"), bias=True),
    Case("lora", lambda r: lf.LoRA(r=r), dead=frozenset({"A"})),
    Case("lora-alpha", lambda r: lf.LoRA(r=r, alpha=3.0), dead=frozenset({"A"})),
    Case("rslora", lambda r: lf.LoRA(r=r, alpha=5.0, rslora=True), dead=frozenset({"A"})),
    Case("template", lambda r: Template()),
]


@dataclass(frozen=True)
class Layer:
    """A linear layer adapted by a case, in the pieces that a variant's functions take."""

    module: nn.Linear
    W: Affine
    variant: lf.Variant
    leaves: dict[str, Tensor]
    x: Tensor

    @property
    def trained(self) -> dict[str, Tensor]:
        return {name: leaf for name, leaf in self.leaves.items() if not name.startswith("_")}

    def apply(self, leaves: dict[str, Tensor] | None = None, x: Tensor | None = None) -> Tensor:
        return self.variant.apply(
            self.W,
            self.leaves if leaves is None else self.leaves | leaves,
            self.x if x is None else x,
        )


def random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def make_layer(
    case: Case,
    d_in: int = 6,
    d_out: int = 5,
    r: int = 2,
    bias: bool = True,
    batch: tuple[int, ...] = (3,),
    seed: int = 0,
    scrambled: bool = False,
    dtype: torch.dtype = torch.float64,
    leaf_dtype: torch.dtype | None = None,
) -> Layer:
    """Make a random layer with a case's adapter, at its start or with random leaves."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(d_in, d_out, bias=bias if case.bias is None else case.bias)
    module.to(dtype).requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(random_like(parameter, generator))
    cfg = case.config(r)
    params = lf.init(module, cfg, seed=seed, dtype=leaf_dtype or dtype)
    leaves = {parse(key).leaf: leaf.detach() for key, leaf in params.items()}
    if scrambled:
        leaves |= {
            name: random_like(leaf, generator)
            for name, leaf in leaves.items()
            if not name.startswith("_")
        }
    x = torch.randn(*batch, d_in, generator=generator, dtype=torch.float64).to(dtype)
    return Layer(module, affine(module), by_config(cfg), leaves, x)
