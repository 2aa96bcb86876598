"""Comparing what a config promises with what a checkpoint holds."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

from torch import nn

from lora_func.modules import original_parameters
from lora_func.peft._formats import (
    PREFIX,
    is_targeted,
    layer_of,
    readable_formats,
    targeted_parameters,
)

Place: TypeAlias = tuple[str, str]
"""The path of a module, and the name of one of its parameters."""


def check_promises(
    model: nn.Module,
    config: Mapping[str, Any],
    to_peft: Callable[[str], str],
    adapted: Collection[str],
    tensors: Collection[str],
    trained: Collection[Place],
) -> None:
    """Check that every module that a config names has its tensors.

    Args:
        model: The model.
        config: The config.
        to_peft: From a path in the model to the checkpoint's path.
        adapted: The sites that have an adapter in the checkpoint.
        tensors: The full names of all tensors.
        trained: The parameters that the checkpoint holds, by the paths of their modules.

    Raises:
        ValueError: If a layer, a projection or a head is missing.
    """
    missing = _missing_sites(model, config, to_peft, adapted)
    for path, module in _saved_modules(model, config, to_peft).items():
        names = (name for name, _ in module.named_parameters())
        expected = {f"{path}.{name}": f"{PREFIX}{to_peft(path)}.{name}" for name in names}
        missing += [name for name, full in expected.items() if full not in tensors]
    missing += _missing_biases(model, config, adapted, trained)
    if missing:
        raise ValueError(
            f"the config names {len(missing)} places for which the file has no tensors, such as "
            f"{missing[:5]}; the file is incomplete, or belongs to another model"
        )


def _missing_biases(
    model: nn.Module,
    config: Mapping[str, Any],
    adapted: Collection[str],
    trained: Collection[Place],
) -> list[str]:
    bias = config.get("bias") or "none"
    return [
        f"{path}.bias"
        for path, module in model.named_modules()
        if bias != "none" and (bias == "all" or path in adapted)
        if original_parameters(module).get("bias") is not None and (path, "bias") not in trained
    ]


def _missing_sites(
    model: nn.Module,
    config: Mapping[str, Any],
    to_peft: Callable[[str], str],
    adapted: Collection[str],
) -> list[str]:
    formats = readable_formats(config["peft_type"])
    layers = {layer for _, found in formats for layer in found.layers}
    any_layer = any(found.whole is not None for _, found in formats)
    sites: list[str] = []
    for path, module in model.named_modules():
        peft_path = to_peft(path)
        if path and is_targeted(config, peft_path):
            layer = layer_of(model, path)
            if layer == "in_proj":
                sites += [f"{path}.in_proj_weight", f"{path}.out_proj"]
            elif any_layer or layer in layers:
                sites.append(path)
        sites += [f"{path}.{name}" for name in targeted_parameters(config, peft_path, module)]
    return [site for site in sites if site not in adapted]


def _saved_modules(
    model: nn.Module, config: Mapping[str, Any], to_peft: Callable[[str], str]
) -> dict[str, nn.Module]:
    """The modules of which PEFT keeps a whole copy."""
    saved: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path and to_peft(path).endswith(tuple(config.get("modules_to_save") or ())):
            around = next((one for one in saved if path.startswith(f"{one}.")), None)
            if around is not None:
                raise ValueError(
                    f"{path}: modules_to_save names it and {around!r} around it; PEFT writes and "
                    "reads such a file wrongly; name one of them"
                )
            saved[path] = module
    return saved
