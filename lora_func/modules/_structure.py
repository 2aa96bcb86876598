"""Whether the modules of a model still stand where they stood."""

from collections.abc import Callable
from typing import NamedTuple
from weakref import ref

from torch import nn

from lora_func.compat import CHILDREN, PARAMETERS, children_of, parameters_of


class Structure(NamedTuple):
    """The modules of a model at one moment.

    Attributes:
        identities: The ids of all modules.
        places: Each module, weakly, with the names and the ids of its children.
    """

    identities: frozenset[int]
    places: tuple[tuple[Callable[[], nn.Module | None], tuple[str, ...], tuple[int, ...]], ...]

    def holds(self) -> bool:
        """True if the same modules stand in the same places; much faster than a walk."""
        for reference, names, ids in self.places:
            module = reference()
            if module is None:
                return False
            if names:
                children = children_of(module)
                if (*children,) != names or (*map(id, children.values()),) != ids:
                    return False
            elif module.__dict__.get(CHILDREN):
                return False
        return True

    def requires_grad(self) -> bool:
        """True if a parameter of any of the modules requires grad."""
        for reference, _, _ in self.places:
            module = reference()
            if module is not None:
                own = module.__dict__.get(PARAMETERS)
                for parameter in parameters_of(module).values() if own is None else own.values():
                    if parameter is not None and parameter.requires_grad:
                        return True
        return False


def structure(model: nn.Module, forget: Callable[[object], None]) -> Structure:
    """Read the structure of a model.

    Args:
        model: The model.
        forget: Called when one of its modules dies: another module may get its id.

    Returns:
        The structure.
    """
    places = tuple(
        (
            ref(module, forget),
            tuple(children_of(module)),
            tuple(id(child) for child in children_of(module).values()),
        )
        for module in model.modules()
    )
    return Structure(identities(model), places)


def identities(model: nn.Module) -> frozenset[int]:
    """Return the ids of a model's modules."""
    return frozenset(map(id, model.modules()))
