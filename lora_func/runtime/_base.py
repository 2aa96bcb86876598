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
    is_spread,
    original_parameters,
)
from lora_func.runtime._overrides import CallState, adapted_tensor
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
    call: CallState,
) -> ReadTracker:
    """Make the dict that holds a module's parameters during a call.

    Args:
        module: The module.
        detaches: Whether its parameters get no gradient.
        source: Gives the adapted parameters to code outside the module, if they are computed.
        replaced: The parameters that are replaced for the whole call, if any.
        call: The call.

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
        tracker.used_by = replaced.keys
        tracker.sharded = id(module) in call.sharding.gathered
        tracker.unused = set() if call.unused is None else call.unused
    if detaches:
        for name, parameter in original.items():
            kept = replaced is not None and name in replaced.new
            if not kept and parameter is not None and parameter.requires_grad:
                frozen: Any = detached(parameter)
                frozen.lent = None, parameter
                dict.__setitem__(tracker, name, frozen)
    if id(module) in call.sharding.flattened:
        source = None  # FSDP1 reads its own parts
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

    Raises:
        ValueError: If one is spread over devices: its gradient cannot be left out for a call.
    """
    taken = {id(original_parameters(one.module)[name]) for one in replaced for name in one.new}
    found = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in original_parameters(module).items():
            if parameter is None or not parameter.requires_grad:
                continue
            if is_spread(parameter):
                raise ValueError(
                    f"{prefix}{name}: is spread over devices and requires grad; freeze the model "
                    "before it is sharded: model.requires_grad_(False), then fully_shard"
                )
            if id(module) not in skipped and id(parameter) not in taken:
                found[prefix + name] = parameter
    return found
