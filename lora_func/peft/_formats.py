"""The formats of the registered variants, the kinds of layers, and how PEFT finds modules."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lora_func.modules import find_site, original_parameters
from lora_func.variant import PeftFormat, Variant
from lora_func.variants import all_variants
from lora_func.weights import is_conv1d, is_linear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def all_formats() -> Iterator[tuple[Variant, PeftFormat]]:
    """Yield every format of every registered variant."""
    for variant in all_variants():
        yield from ((variant, one) for one in variant.peft)


def readable_formats(peft_type: str) -> list[tuple[Variant, PeftFormat]]:
    """Return the formats in which checkpoints of a kind are read."""
    return [
        (variant, one)
        for variant, one in all_formats()
        if one.peft_type == peft_type and one.convert is None
    ]


def writable_format(
    variant: Variant, leaves: Mapping[str, Tensor], layer: str
) -> PeftFormat | None:
    """Return the format in which a site is written; None if PEFT has none.

    Args:
        variant: The site's variant.
        leaves: Its leaves.
        layer: The kind of its layer, as ``layer_of`` names it.
    """
    return next((f for f in variant.peft if layer in f.layers and f.holds(leaves)), None)


def layer_of(model: nn.Module, path: str) -> str:
    """Name the kind of layer that PEFT sees at a site, as ``PeftFormat.layers`` does.

    Args:
        model: The model.
        path: Path of the module, or of the parameter.

    Returns:
        The name; the name of its class for a module without a kind of its own.
    """
    module, parameter = find_site(model, path)
    if isinstance(module, nn.MultiheadAttention):
        return "in_proj" if parameter in (None, "in_proj_weight") else "Parameter"
    if parameter is not None:
        return "Parameter"
    around, _, name = path.rpartition(".")
    if name == "out_proj" and isinstance(find_site(model, around)[0], nn.MultiheadAttention):
        return "out_proj"
    kinds = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for kind in kinds:
        if isinstance(module, kind):
            return kind.__name__
    if is_conv1d(module):
        return "Conv1D"
    return "Linear" if is_linear(module) else type(module).__name__


def sizes_of(model: nn.Module, path: str) -> tuple[int, ...]:
    """Return the sizes of a convolution's kernel, or the number of matrices in a stack."""
    module, parameter = find_site(model, path)
    if parameter is not None:
        shape = original_parameters(module)[parameter].shape
        return tuple(shape[:1]) if len(shape) == 3 else ()
    return tuple(getattr(module, "kernel_size", ()))


def is_targeted(config: Mapping[str, Any], path: str) -> bool:
    """True if PEFT adapts the module of a path, as ``check_target_module_exists`` decides it."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or ()
    if not targets or _is_named(excluded, path) or is_saved(config, path, strictly=True):
        return False
    if isinstance(targets, str) or path in targets:
        return _is_named(targets, path)
    return _is_named(targets, path) and _is_in_layers(config, path)


def _is_named(names: str | Sequence[str], path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _is_in_layers(config: Mapping[str, Any], path: str) -> bool:
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or ()
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    ways = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    match = next(filter(None, (re.match(way, path) for way in ways)), None)
    wanted = [layers] if isinstance(layers, int) else layers
    return match is not None and int(match[1]) in wanted


def is_saved(config: Mapping[str, Any], path: str, *, strictly: bool = False) -> bool:
    """True if PEFT keeps a whole copy of the module of a path, or of one around it.

    Args:
        config: The config.
        path: The path.
        strictly: Whether names must be whole, as where PEFT decides that no adapter stands there.

    Returns:
        Whether it does.
    """
    names = config.get("modules_to_save") or ()
    if strictly:
        return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in names)
    parts = path.split(".")
    around = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return any(one.endswith(tuple(names)) for one in around)


def targeted_parameters(config: Mapping[str, Any], path: str, module: nn.Module) -> list[str]:
    """Return the parameters of a module that PEFT adapts by their names, in PEFT's order."""
    names = config.get("target_parameters") or ()
    own = [name for name, p in original_parameters(module).items() if p is not None]
    return [name for name in own if _is_named(list(names), f"{path}.{name}")]


def at_site(config: Mapping[str, Any], found: PeftFormat, path: str) -> dict[str, Any]:
    """Return the config for one site, with its exceptions."""
    own = dict(config)
    for name, pattern in found.patterns.items():
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", path):
                own[name] = value
                break
    return own
