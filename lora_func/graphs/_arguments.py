"""The arguments and results of a captured function: their leaves, and the graph's own tensors."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_func.compat import copy_all, name_of_path, tree_flatten_with_path, tree_unflatten
from lora_func.graphs import _cuda

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class Arguments(NamedTuple):
    """The arguments with which a function was captured.

    Attributes:
        names: The name of each leaf, for messages.
        leaves: The leaves: of tensors the graph's own ones, which it reads.
        layout: The tree that holds the leaves.
    """

    names: list[str]
    leaves: list[Any]
    layout: Any

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The graph's own tensors, by the names of their leaves."""
        named = zip(self.names, self.leaves, strict=True)
        return {name: leaf for name, leaf in named if isinstance(leaf, Tensor)}

    @property
    def device(self) -> torch.device | None:
        """The device of the tensors; None if there are none."""
        return next((tensor.device for tensor in self.tensors.values()), None)

    def tree(self) -> tuple[Any, ...]:
        """Return the arguments."""
        arguments: tuple[Any, ...] = tree_unflatten(self.leaves, self.layout)
        return arguments

    def fill(self, given: tuple[Any, ...]) -> None:
        """Copy the values of other arguments into the graph's own tensors, in one kernel.

        Raises:
            TypeError: If a leaf is missing or unknown, or one that is no tensor is another one.
            ValueError: If a tensor has another shape, dtype or device.
        """
        found = dict(_named(given)[0])
        if found.keys() != {*self.names}:
            name = min(found.keys() ^ {*self.names})
            what = "is missing" if name in self.names else "was not there at the capture"
            raise TypeError(f"{name}: {what}; capture the function again for other arguments")
        own_memory = {_memory(tensor) for tensor in self.tensors.values()}
        targets, sources = [], []
        for name, own in zip(self.names, self.leaves, strict=True):
            leaf = found[name]
            _check_alike(name, own, leaf)
            if isinstance(own, Tensor) and own is not leaf:
                targets.append(own.detach())
                # another of the graph's own tensors would be overwritten before it is read
                shared = _memory(leaf) in own_memory
                sources.append(leaf.detach().clone() if shared else leaf.detach())
        copy_all(targets, sources)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _named(arguments: tuple[Any, ...]) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of arguments by name, and their tree."""
    found, layout = tree_flatten_with_path(arguments)
    named = []
    for path, leaf in found:
        argument: Any = path[0]
        named.append((f"argument {argument.idx}{name_of_path(path[1:])}", leaf))
    return named, layout


def arguments_of(examples: tuple[Any, ...]) -> Arguments:
    """Make the graph's own tensors from example arguments.

    Returns:
        The arguments with them.

    Raises:
        TypeError: If a tensor is not on a GPU, or something may hold tensors that are not seen.
        ValueError: If tensors are on several devices.
    """
    named, layout = _named(examples)
    devices: dict[torch.device, str] = {}
    for name, leaf in named:
        _check_leaf(name, leaf)
        if isinstance(leaf, Tensor):
            devices[leaf.device] = name
    if len(devices) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ValueError(f"capture: {places}; a CUDA graph belongs to one device")
    return Arguments([name for name, _ in named], [_owned(leaf) for _, leaf in named], layout)


def _owned(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def _check_leaf(name: str, leaf: Any) -> None:
    if isinstance(leaf, Tensor):
        _check_device(name, leaf)
    elif not isinstance(leaf, (*_CONSTANTS, nn.Module)):
        raise TypeError(
            f"{name}: got {type(leaf).__name__}, which may hold tensors that the graph does not "
            "see; accepted are dicts, lists and tuples of tensors on a GPU, modules, and plain "
            "values; pass its tensors (dict(batch) of a BatchEncoding), or let the function use it "
            "from outside"
        )


def _check_device(name: str, leaf: Tensor) -> None:
    if leaf.layout != torch.strided:
        raise TypeError(f"{name}: is {leaf.layout}; a CUDA graph copies dense tensors")
    if leaf.device.type != _cuda.GPU:
        raise TypeError(
            f"{name}: is a tensor on {leaf.device}; a CUDA graph reads and writes the memory of "
            f'one GPU; move it there with .to("{_cuda.GPU}")'
        )


def _check_alike(name: str, own: Any, leaf: Any) -> None:
    if not isinstance(own, Tensor):
        plain = type(own) is type(leaf) and isinstance(own, _CONSTANTS)
        nan = own != own and leaf != leaf
        if own is not leaf and not (plain and (nan or own == leaf)):
            raise TypeError(
                f"{name}: got {_short(leaf)}, captured with {_short(own)}, which the graph holds "
                "for good; capture the function again for another one"
            )
        return
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{name}: got {_short(leaf)}, captured with a tensor")
    _check_device(name, leaf)
    for what, now, then in (
        ("shape", tuple(leaf.shape), tuple(own.shape)),
        ("dtype", leaf.dtype, own.dtype),
        ("device", leaf.device, own.device),
    ):
        if now != then:
            raise ValueError(
                f"{name}: got {what} {now}, captured with {then}; a CUDA graph has one size for "
                "each tensor: capture the function again for this one"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else type(value).__name__


class Results(NamedTuple):
    """What a captured function returns.

    Attributes:
        leaves: The leaves: of tensors those that the graph writes.
        layout: The tree that holds the leaves.
    """

    leaves: list[Any]
    layout: Any

    def tree(self, copied: bool) -> Any:
        """Return the results, as new tensors or as those that the next replay overwrites."""
        if not copied:
            return tree_unflatten(self.leaves, self.layout)
        tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        copies = [torch.empty_like(tensor) for tensor in tensors]
        copy_all(copies, tensors)
        fresh = iter(copies)
        leaves = [next(fresh) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.layout)


def results_of(output: Any) -> Results:
    """Take what a function returned while it was captured.

    Returns:
        The results.

    Raises:
        TypeError: If a tensor is not on a GPU, or something may hold tensors that are not seen.
    """
    found, layout = tree_flatten_with_path(output)
    for path, leaf in found:
        _check_result(f"result{name_of_path(path)}", leaf)
    leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for _, leaf in found]
    return Results(leaves, layout)


def _check_result(name: str, leaf: Any) -> None:
    if isinstance(leaf, Tensor):
        _check_device(name, leaf)
    elif not isinstance(leaf, _CONSTANTS):
        raise TypeError(
            f"{name}: is a {type(leaf).__name__}, which may hold tensors that the graph does not "
            "see; return tensors in dicts, lists and tuples (of a transformers model the loss or "
            "the logits, or the whole output with use_cache=False)"
        )
