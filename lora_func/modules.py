"""Walking through a model: paths, parameters, and whether its structure has changed."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias
from weakref import ref

from torch import Tensor, nn

from lora_func.compat import CHILDREN, PARAMETERS, children_of, parameters_of, uncompiled


def find_site(model: nn.Module, path: str) -> tuple[nn.Module, str | None]:
    """Find the module or parameter that a path names.

    Args:
        model: The model.
        path: Path of a module or of a parameter.

    Returns:
        The module and None; or the module that holds the parameter, and the parameter's name there.

    Raises:
        KeyError: If the model has neither.
    """
    try:
        return model.get_submodule(path), None
    except AttributeError:
        parent, _, name = path.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        module = None
    if module is None or parameters_of(module).get(name) is None:
        raise KeyError(f"the model has no module and no parameter {path!r}")
    return module, name


class AttachedView(nn.Module):
    """A parametrization with which ``attach`` adapts a parameter; it marks its model."""


def attached_path(model: nn.Module) -> str | None:
    """Return the path of a module that has an adapter attached; None if there is none."""
    found = (path for path, m in model.named_modules() if isinstance(m, AttachedView))
    path = next(found, None)
    return None if path is None else path.partition("parametrizations.")[0].removesuffix(".")


def called_model(model: nn.Module) -> nn.Module:
    """Return the module to call: data parallelism serves the module's own gradients alone."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


def inner_model(model: nn.Module) -> nn.Module:
    """Return the model inside of torch's wrappers, whose paths are those of an adapter's keys."""
    inner = called_model(uncompiled(model))
    return model if inner is model else inner_model(inner)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter of each module; a tied parameter once for each of its places."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in parameters_of(module).items():
            if parameter is not None:
                yield prefix + name, parameter


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


class ReadTracker(dict[str, Any]):
    """The parameters of a module while an adapter is injected.

    The module itself reads them by ``inner``. Other code reads them by name, as attributes of the
    module, and gets what the module computes with: the adapted parameter.

    Attributes:
        original: The dict that this one replaces during the call.
        source: Gives the adapted parameter, from its name and the stored one; None if the stored
            one is what the module computes with.
    """

    __slots__ = ("original", "source")
    original: dict[str, Any]
    source: "AdaptedSource | None"

    def inner(self, name: str) -> Any:
        """Return a stored parameter."""
        return dict.__getitem__(self, name)

    def __getitem__(self, name: str) -> Any:
        value = self.inner(name)
        if self.source is None:
            return value
        found = self.source.adapt(name, value)
        if found is not value:
            found.lent = value, self.original.get(name)
        return found

    def get(self, name: str, default: Any = None) -> Any:
        """Return a parameter as code outside the module reads it."""
        return self[name] if name in self else default  # noqa: SIM401

    def __setitem__(self, name: str, value: Any) -> None:
        """Store a parameter for good: hooks that load or gather weights write through.

        Code that swaps a parameter gives back what it read, which is not the original.
        """
        stored, original = getattr(value, "lent", (value, value))
        before = self.original.get(name)
        # what a hook loads in place of a parameter that lost its gradient for the call
        if value is original and before is not None and before.requires_grad:
            original = original if original.requires_grad else nn.Parameter(original.data)
        dict.__setitem__(self, name, value if stored is None else stored)
        self.original[name] = original

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self.original),)


class AdaptedSource(Protocol):
    """What knows the adapted parameters of a module."""

    def adapt(self, name: str, stored: Any) -> Any:
        """Return what code outside the module reads for a stored parameter."""


class ReplacedParameters(ReadTracker):
    """The parameters of a module of which some are replaced for the whole call.

    Attributes:
        used_by: Name -> the keys of the adapter that reading it uses.
        unused: The keys that nothing has used yet; reading removes some.
    """

    __slots__ = ("unused", "used_by")
    used_by: Mapping[str, Collection[str]]
    unused: set[str]

    def inner(self, name: str) -> Any:
        """Return a stored parameter, and note that it was used."""
        self.unused.difference_update(self.used_by.get(name, ()))
        return dict.__getitem__(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        """Store a parameter, unless a hook loads the one that is replaced."""
        before = self.original.get(name)
        if name not in self.used_by or before is None or not before.is_meta:
            super().__setitem__(name, value)


def original_parameters(module: nn.Module) -> dict[str, Any]:
    """Return a module's parameters as they are without an adapter, injected or attached."""
    own = parameters_of(module)
    if isinstance(own, ReadTracker):
        return own.original
    lists: Any = children_of(module).get("parametrizations")
    if lists is None:
        return own
    attached = {n: one.original for n, one in lists.items() if isinstance(one[0], AttachedView)}
    return {**own, **attached}


def inner_parameters(module: nn.Module) -> dict[str, Any]:
    """Return the parameters that a module itself runs with, before its adapter changes them."""
    own = parameters_of(module)
    return {name: own.inner(name) for name in own} if isinstance(own, ReadTracker) else own


Place: TypeAlias = tuple[nn.Module, str]
"""A module and the name of one of its own parameters."""


def shared_parameters(model: nn.Module) -> dict[Place, list[Place]]:
    """Return all places at which a model has the parameter of a place."""
    places: dict[int, list[Place]] = {}
    for module in model.modules():
        for name, parameter in original_parameters(module).items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return {place: together for together in places.values() for place in together}
