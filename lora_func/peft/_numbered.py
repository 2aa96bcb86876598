"""Tensors that PEFT stores by the number of their site, in the order of the model."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lora_func.peft._formats import PREFIX
from lora_func.variant import PeftFormat


def with_numbers(
    model: nn.Module, tensors: dict[str, Tensor], formats: Sequence[PeftFormat]
) -> dict[str, Tensor]:
    """Replace the paths of sites by their numbers, in the names of tensors that PEFT numbers.

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
    return {renamed.get(key, key): tensor for key, tensor in tensors.items()}


def with_paths(
    model: nn.Module,
    tensors: dict[str, Tensor],
    formats: Sequence[PeftFormat],
    to_model: Callable[[str], str],
) -> dict[str, Tensor]:
    """Replace the numbers of sites by their paths.

    Args:
        model: The model.
        tensors: Full name -> tensor.
        formats: The formats that the checkpoint may have.
        to_model: From a path in the checkpoint to one in the model.

    Returns:
        The tensors by names with paths; those whose number belongs to no site are left as they are.
    """
    renamed = {}
    for found in formats:
        if found.numbered:
            first = next(leaf.name for leaf in found.leaves.values() if leaf.name != found.numbered)
            for number, path in enumerate(_paths(model, tensors, first, to_model)):
                key = f"base_model.{found.numbered}.{number}"
                renamed[key] = f"{PREFIX}{path}.{found.numbered}"
    return {renamed.get(key, key): tensor for key, tensor in tensors.items()}


def _paths(
    model: nn.Module, tensors: dict[str, Tensor], name: str, to_model: Callable[[str], str]
) -> list[str]:
    """The paths of the modules that have a tensor of a name, in the order of the model."""
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    ends = [key.removesuffix(f".{name}") for key in tensors if key.endswith(f".{name}")]
    paths = [path.removeprefix(PREFIX) for path in ends]
    return sorted(paths, key=lambda path: order.get(to_model(path), len(order)))
