"""Tied parameters: the places at which a model has one parameter."""

from typing import Any, TypeAlias

from torch import Tensor, nn

from lora_func.modules._tracking import offloading_hook, original_parameters

Place: TypeAlias = tuple[nn.Module, str]
"""A module and the name of one of its own parameters."""


def shared_parameters(model: nn.Module) -> dict[Place, list[Place]]:
    """Return all places at which a model has the parameter of a place."""
    places: dict[Any, list[Place]] = {}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for path, module in model.named_modules():
        for name, parameter in original_parameters(module).items():
            if parameter is not None:
                full = f"{path}.{name}" if path else name
                identity = _identity(module, name, parameter, tied.get(full, full))
                places.setdefault(identity, []).append((module, name))
    return {place: together for together in places.values() for place in together}


def _identity(module: nn.Module, name: str, parameter: Tensor, source: str) -> Any:
    """What the places of one parameter share."""
    # an offloaded parameter is another object at each place: accelerate holds those of one in one
    # memory, and transformers knows them by their names
    weights = getattr(offloading_hook(module), "weights_map", None)
    if not parameter.is_meta or weights is None:
        return id(parameter)
    held = getattr(weights, "dataset", weights)
    if isinstance(held, dict):
        return weights[name].data_ptr(), weights[name].shape
    return source
