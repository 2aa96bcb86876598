"""The parameters of a module while an adapter is injected: who reads them, and what they get."""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from lora_func.compat import HF_HOOK, children_of, parameters_of
from lora_func.modules._spread import is_spread


class AttachedView(nn.Module):
    """A parametrization with which ``attach`` adapts a parameter; it marks its model."""


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
        stand_ins: Name -> what code outside the module reads for a parameter without data.
        sharded: True if FSDP2 stores here what it gathers, and what it reads must be its own.
    """

    __slots__ = ("sharded", "stand_ins", "unused", "used_by")
    used_by: Mapping[str, Collection[str]]
    unused: set[str]
    stand_ins: Mapping[str, Any]
    sharded: bool

    def __getitem__(self, name: str) -> Any:
        if self.sharded and name in self.used_by and is_spread(self.original[name]):
            return self.original[name]
        found = super().__getitem__(name)
        stand_in = self.stand_ins.get(name)
        if stand_in is None:
            return found
        stand_in.lent = found, self.original[name]
        return stand_in

    def inner(self, name: str) -> Any:
        """Return a stored parameter, and note that it was used."""
        self.unused.difference_update(self.used_by.get(name, ()))
        return dict.__getitem__(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        """Store a parameter, unless a hook loads or gathers the one that is replaced."""
        before = self.original.get(name)
        if self.sharded and name in self.used_by:
            self.original[name] = value
            kept = self.inner(name)
            if kept.dtype != value.dtype:
                with torch.enable_grad():  # FSDP2 gathers without gradients
                    kept = kept.to(value.dtype)
                dict.__setitem__(self, name, kept)
        elif name not in self.used_by or before is None or not before.is_meta:
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


def offloading_hook(module: nn.Module) -> Any:
    """Return accelerate's hook that loads a module's weights for its forward alone; or None."""
    hook = vars(module).get(HF_HOOK)
    hooks = getattr(hook, "hooks", (hook,))
    return next((one for one in hooks if getattr(one, "offload", False)), None)
