"""Laws on a module of another package, such as PEFT's layers."""

from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_func.configs import AdapterConfig
from lora_func.testing._cases import Fit, Start, Subject, find_fit
from lora_func.testing._law import Law
from lora_func.testing._layers import Layer
from lora_func.testing._report import Report, checked
from lora_func.testing.laws import LAWS
from lora_func.variant import Variant
from lora_func.weights import affine


@dataclass(frozen=True, repr=False)
class ForeignCase(Subject):
    """A module of another package around a linear layer; its trained parameters are the leaves.

    Attributes:
        factory: Wraps a frozen layer, given a rank, into the module with a fresh adapter.
        merged: Gives the linear layer into which the module is merged; None if it has none.
    """

    factory: Callable[[nn.Linear, int], nn.Module]
    merged: Callable[[nn.Module], nn.Linear] | None = field(default=None, kw_only=True)

    @property
    def has_weight(self) -> bool:
        """True if it is known how the module is merged."""
        return self.merged is not None

    def adapted(self, module: nn.Linear, x: Tensor, sizes: Mapping[str, Any]) -> Layer:
        """Give a layer a fresh adapter, as ``Subject.adapted`` says."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sizes["seed"])
            outer = self.factory(deepcopy(module), sizes["r"])
        leaves = {}
        for name, parameter in outer.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(sizes["leaf_dtype"])
                leaves[name] = parameter.detach().clone()
        return Layer(module, affine(module), self._functions(outer), leaves, x, sizes)

    def _functions(self, outer: nn.Module) -> Variant:
        """The module as functions of its leaves."""

        def apply(W: Any, leaves: Mapping[str, Tensor], x: Tensor) -> Tensor:
            output: Tensor = functional_call(outer, {**leaves}, (x,))
            return output

        def merged(leaves: Mapping[str, Tensor]) -> nn.Linear:
            assert self.merged is not None
            copied = deepcopy(outer)
            with torch.no_grad():
                for name, parameter in copied.named_parameters():
                    if name in leaves:
                        parameter.copy_(leaves[name])
                return self.merged(copied)

        def weight(W: Any, leaves: Mapping[str, Tensor]) -> Tensor:
            return merged(leaves).weight

        def bias(b: Tensor | None, leaves: Mapping[str, Tensor]) -> Tensor | None:
            return merged(leaves).bias

        views = {} if self.merged is None else {"weight": weight, "bias": bias}
        return Variant(self.name, AdapterConfig, _not_called, apply, {}, **views)  # type: ignore[arg-type]


def _not_called(*_: Any) -> dict[str, Tensor]:
    raise NotImplementedError


def check_foreign(
    module_factory: Callable[[nn.Linear, int], nn.Module],
    *,
    name: str = "module",
    merged: Callable[[nn.Module], nn.Linear] | None = None,
    dead: Collection[str] | None = None,
    bias: bool | None = None,
    start: Start = "exact",
    jumps: bool = False,
    batch_axes: tuple[int, int] = (0, 3),
    detached: Collection[str] = (),
    fit: Fit | None = None,
    examples: int = 10,
    laws: Iterable[Law] = LAWS,
) -> Report:
    """Check an adapter that is a module of another package, against the laws that apply to it.

    Args:
        module_factory: Wraps a frozen layer, given a rank, into the module with a fresh adapter.
            Parameters that require grad are its leaves.
        name: Shown in the report.
        merged: Gives the linear layer into which a module is merged, to compare both; it may
            change the module that it gets.
        dead: As in ``Case``, by the names of the parameters.
        bias: As in ``Case``.
        start: As in ``Case``.
        jumps: As in ``Case``.
        batch_axes: As in ``Case``.
        detached: As in ``Case``, by the names of the parameters.
        fit: As in ``Case``; by default sizes are found by trying.
        examples: How many examples to draw for each law.
        laws: The laws to check; those that need a ``Variant`` are left out.

    Returns:
        The report; print it.

    Raises:
        ValueError: If no sizes are found that the module accepts.
    """
    named = None if dead is None else frozenset(dead)
    settings: Any = {"dead": named, "bias": bias, "start": start, "jumps": jumps}
    settings |= {"batch_axes": batch_axes, "detached": frozenset(detached)}

    def run(layer: nn.Linear, r: int) -> object:
        return module_factory(layer, r)(torch.ones(2, layer.in_features))

    settings["fit"] = fit or find_fit(run, bias)
    case = ForeignCase(name, module_factory, merged=merged, **settings)
    return checked(case, laws, examples)
