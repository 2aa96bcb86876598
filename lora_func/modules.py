"""Walking through a model."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor, nn


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


class Structure(NamedTuple):
    """The modules of a model as they stood.

    Attributes:
        identities: The ids of all.
        places: Each module, weakly, with the names and the ids of its children.
    """

    identities: frozenset[int]
    places: tuple[tuple[Callable[[], nn.Module | None], tuple[str, ...], tuple[int, ...]], ...]

    def holds(self) -> bool:
        """Tell whether the same modules stand in the same places, much faster than a walk."""
        for reference, names, ids in self.places:
            children = getattr(reference(), "_modules", None)
            if children is None or len(children) != len(names):
                return False
            if names and ((*children,) != names or (*map(id, children.values()),) != ids):
                return False
        return True

    def requires_grad(self) -> bool:
        """Tell whether a parameter of any of the modules requires grad."""
        modules = [module for reference, _, _ in self.places if (module := reference())]
        parameters = [p for module in modules for p in module._parameters.values()]
        return any(p.requires_grad for p in parameters if p is not None)


def structure(model: nn.Module, forget: Callable[[object], None]) -> Structure:
    """Read the structure of a model.

    Args:
        model: The model.
        forget: Called when one of its modules is gone: another may come to stand at the same place
            in memory.

    Returns:
        The structure.
    """
    places = tuple(
        (
            ref(module, forget),
            tuple(module._modules),
            tuple(id(child) for child in module._modules.values()),
        )
        for module in model.modules()
    )
    return Structure(identities(model), places)


def identities(model: nn.Module) -> frozenset[int]:
    """Return the ids of a model's modules."""
    return frozenset(map(id, model.modules()))
