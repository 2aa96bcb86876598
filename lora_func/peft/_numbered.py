"""Tensors that PEFT stores by numbers: those of sites in the model's order, or of a list."""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lora_func.peft._formats import PREFIX
from lora_func.variant import PeftFormat


def with_numbers(
    model: nn.Module, tensors: dict[str, Tensor], formats: Sequence[PeftFormat]
) -> dict[str, Tensor]:
    """Give tensors the numbers that PEFT gives them, for sites and in lists.

    Args:
        model: The model.
        tensors: Full name -> tensor.
        formats: The formats of the sites.

    Returns:
        The tensors by PEFT's names.
    """
    renamed = {
        f"{PREFIX}{path}.{name}": f"base_model.{name}.{number}"
        for name in {found.numbered for found in formats if found.numbered}
        for number, path in enumerate(_paths(model, tensors, name, lambda path: path))
    }
    tensors = {renamed.get(key, key): tensor for key, tensor in tensors.items()}
    lists = {name for found in formats for name in found.lists_of}
    return {
        name: part
        for key, tensor in tensors.items()
        for name, part in (_parts(key, tensor) if key.endswith(tuple(lists)) else [(key, tensor)])
    }


def _parts(key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    return [(f"{key}.{i}.weight", part.clone()) for i, part in enumerate(tensor)]


def with_paths(
    model: nn.Module,
    tensors: dict[str, Tensor],
    formats: Sequence[PeftFormat],
    to_model: Callable[[str], str],
) -> dict[str, Tensor]:
    """Undo ``with_numbers``: numbers of sites become paths, lists become tensors.

    Args:
        model: The model.
        tensors: Full name -> tensor.
        formats: The formats that the checkpoint may have.
        to_model: From a path in the checkpoint to one in the model.

    Returns:
        The tensors; those whose number belongs to no site are left as they are.
    """
    renamed = {}
    for found in formats:
        if found.numbered:
            first = next(leaf.name for leaf in found.leaves.values() if leaf.name != found.numbered)
            for number, path in enumerate(_paths(model, tensors, first, to_model)):
                key = f"base_model.{found.numbered}.{number}"
                renamed[key] = f"{PREFIX}{path}.{found.numbered}"
    tensors = {renamed.get(key, key): tensor for key, tensor in tensors.items()}
    for name in {name for found in formats for name in found.lists_of}:
        tensors = _stacked(tensors, name)
    return tensors


def _stacked(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    lists: dict[str, dict[int, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        if part := re.fullmatch(rf"(.*\.{name})\.(\d+)\.weight", key):
            lists.setdefault(part[1], {})[int(part[2])] = tensor
        else:
            others[key] = tensor
    stacked = {key: torch.stack([parts[i] for i in sorted(parts)]) for key, parts in lists.items()}
    return {**others, **stacked}


def _paths(
    model: nn.Module, tensors: dict[str, Tensor], name: str, to_model: Callable[[str], str]
) -> list[str]:
    """The paths of the modules that have a tensor of a name, in the order of the model."""
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    ends = [key.removesuffix(f".{name}") for key in tensors if key.endswith(f".{name}")]
    paths = [path.removeprefix(PREFIX) for path in ends]
    return sorted(paths, key=lambda path: order.get(to_model(path), len(order)))
