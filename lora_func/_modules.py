"""Walking through a model."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from torch import Tensor, nn

Structure: TypeAlias = tuple[tuple[str, int], ...]
"""Name and id of each module of a model, in order."""


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile(model)`` wraps; any other module as it is."""
    original = getattr(model, "_orig_mod", model)
    assert isinstance(original, nn.Module)
    return original


class PartOfCall(nn.Module):
    """A function that runs a part of a model, as a module for ``functional_call``."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)


def forward_slot(module: nn.Module) -> str:
    """Name the attribute whose place an adapter takes: accelerate's hooks live in "forward"."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def place_of(model: nn.Module, path: str) -> tuple[nn.Module, str | None]:
    """Find what a path names.

    Args:
        model: The model.
        path: Of a module or of a parameter.

    Returns:
        The module and None, or the module that holds the parameter and its name there.

    Raises:
        KeyError: If there is neither.
    """
    try:
        return model.get_submodule(path), None
    except AttributeError:
        parent, _, name = path.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        module = None
    if module is None or module._parameters.get(name) is None:
        raise KeyError(f"the model has no module and no parameter {path!r}")
    return module, name


def named_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter of each module; a tied one at each of its places."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter


def structure(model: nn.Module) -> Structure:
    """Return what two models share if the same modules stand in the same places.

    Args:
        model: The model.

    Returns:
        The name and id of each module, at a fraction of the cost of ``named_modules()``.
    """
    places: list[tuple[str, int]] = []
    known: set[int] = set()
    pending = [("", model)]
    while pending:
        name, module = pending.pop()
        places.append((name, id(module)))
        if id(module) not in known:
            known.add(id(module))
            pending.extend((n, m) for n, m in module._modules.items() if m is not None)
    return tuple(places)


def identities(places: Structure) -> frozenset[int]:
    """Return the ids of the modules alone."""
    return frozenset(module for _, module in places)
