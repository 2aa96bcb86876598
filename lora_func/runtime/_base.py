"""The base parameters during a call: detached, tracked, or replaced."""

from collections.abc import Callable, Container, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from lora_func.compat import PARAMETERS
from lora_func.modules import (
    AdaptedSource,
    ReadTracker,
    ReplacedParameters,
    original_parameters,
)
from lora_func.runtime._overrides import adapted_tensor
from lora_func.runtime._replacements import Replacement


class PartOfCall(nn.Module):
    """A function that runs a part of a model, as a module for ``functional_call``."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)


def tracker_of(
    module: nn.Module,
    detaches: bool,
    source: AdaptedSource | None,
    replaced: Replacement | None,
    unused: set[str] | None,
) -> ReadTracker:
    """Make the dict that holds a module's parameters during a call.

    Args:
        module: The module.
        detaches: Whether its parameters get no gradient.
        source: Gives the adapted parameters to code outside the module, if they are computed.
        replaced: The parameters that are replaced for the whole call, if any.
        unused: The keys that nothing has used yet.

    Returns:
        The tracker.
    """
    original = module.__dict__.get(PARAMETERS)
    if type(original) is not dict:
        original = original_parameters(module)
    tracker: ReadTracker
    if replaced is None:
        tracker = ReadTracker(original)
    else:
        tracker = ReplacedParameters(original)
        tracker.update(replaced.new)
        # accelerate's hooks make what they load by calling the class of what they read
        tracker.stand_ins = {
            name: adapted_tensor(original[name], partial(_same, new))
            for name, new in replaced.new.items()
            if original[name] is not None and original[name].is_meta
        }
        tracker.used_by, tracker.unused = replaced.keys, set() if unused is None else unused
    if detaches:
        for name, parameter in original.items():
            kept = replaced is not None and name in replaced.new
            if not kept and parameter is not None and parameter.requires_grad:
                frozen: Any = detached(parameter)
                frozen.lent = None, parameter
                dict.__setitem__(tracker, name, frozen)
    tracker.original, tracker.source = original, source
    return tracker


def _same(tensor: Tensor) -> Tensor:
    return tensor


def detached(parameter: Tensor) -> Tensor:
    """Return a parameter without its gradient.

    One without data stays a Parameter: accelerate's hooks load a tensor of the class they find.
    """
    if parameter.is_meta:
        return nn.Parameter(parameter.data, requires_grad=False)
    return parameter.detach()


def trainable_parameters(
    model: nn.Module, skipped: Container[int], replaced: Iterable[Replacement]
) -> dict[str, Tensor]:
    """Return the base parameters that would get a gradient.

    Args:
        model: The model.
        skipped: The ids of modules whose parameters a tracker holds.
        replaced: The parameters that are replaced for the whole call.

    Returns:
        Name -> parameter.
    """
    taken = {id(original_parameters(one.module)[name]) for one in replaced for name in one.new}
    found = {}
    for path, module in model.named_modules():
        if id(module) in skipped:
            continue
        prefix = f"{path}." if path else ""
        for name, parameter in original_parameters(module).items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in taken:
                found[prefix + name] = parameter
    return found
