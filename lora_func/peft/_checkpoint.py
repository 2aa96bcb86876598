"""The files of a checkpoint: its config, and its tensors by module."""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_func.errors import AdapterFileError
from lora_func.peft._formats import CONFIG, PREFIX, WEIGHTS, all_formats, readable_formats
from lora_func.variant import PeftFormat

_COMMON = (
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "peft_version", "target_modules", "exclude_modules", "target_parameters"),
    *("layers_to_transform", "layers_pattern", "modules_to_save", "ensure_weight_tying", "bias"),
    *("init_weights", "fan_in_fan_out"),
)
"""Settings of all kinds that are understood, or change nothing in a checkpoint that is loaded."""

BASE = "base_layer"
"""The name that PEFT puts before what an adapter wraps."""

_ORIGINAL, _COPY = "original_module", "modules_to_save"
"""The names of a module that PEFT keeps whole, and of its copy; seen with ``bias="all"`` alone."""


class Stored(NamedTuple):
    """The tensors of a checkpoint at one module.

    Attributes:
        path: The module's path in the checkpoint's names.
        depth: How many adapters of parameters stand around the one that these tensors are of.
        tensors: The rest of the name -> tensor.
    """

    path: str
    depth: int
    tensors: dict[str, Tensor]


def read_config(folder: Path) -> dict[str, Any]:
    """Read a config.

    Returns:
        The config, with PEFT's values for the settings that it leaves out.

    Raises:
        FileNotFoundError: If there is no file.
        AdapterFileError: If no variant reads its kind, or a setting is unknown or has a value that
            is not understood.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        config = dict(json.loads(path.read_text()))
        kind = config["peft_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterFileError(f"{path}: is no config of PEFT ({error!r})") from error
    formats = [found for _, found in readable_formats(kind)]
    if not formats:
        known = sorted({found.peft_type for _, found in all_formats()})
        raise AdapterFileError(f"{path}: is of kind {kind!r}; the kinds that are read are {known}")
    config = _flat(config, formats)
    for found in formats:
        config = {**found.defaults, **config}
    _check_settings(path, config, formats)
    return config


def _flat(config: Mapping[str, Any], formats: Sequence[PeftFormat]) -> dict[str, Any]:
    """The config with dotted names for the settings of the sub-configs that are read."""
    names = {name for found in formats for name in (*found.defaults, *found.ignored)}
    outer = {name.partition(".")[0] for name in names if "." in name}
    flat: dict[str, Any] = {}
    for name, value in config.items():
        inner = value if name in outer and isinstance(value, dict) else None
        flat |= {name: value} if inner is None else {f"{name}.{k}": v for k, v in inner.items()}
    return flat


def _check_settings(path: Path, config: Mapping[str, Any], formats: Sequence[PeftFormat]) -> None:
    kind = config["peft_type"]
    inert: dict[str, tuple[Any, ...]] = {}
    known_settings: set[str | None] = {*_COMMON}
    for found in formats:
        inert |= {name: (*inert.get(name, ()), *ok) for name, ok in found.inert.items()}
        known_settings |= {*found.defaults, *found.inert, *found.ignored, *found.patterns.values()}
        known_settings |= {*found.patterns, found.listed}
    for name, harmless in inert.items():
        if config.get(name) not in harmless:
            raise AdapterFileError(
                f"{path}: {name} is {config.get(name)!r}; this setting changes the base or the "
                f"forward pass, and is read only at {tuple(dict.fromkeys(harmless))}"
            )
    for found in formats:
        for name, default in found.defaults.items():
            _check_value(path, name, config[name], default)
    if not re.fullmatch("none|all|[a-z]+_only", str(config.get("bias") or "none")):
        raise AdapterFileError(f"{path}: bias is {config['bias']!r}, expected none, all or *_only")
    for name, value in config.items():
        if name not in known_settings and value not in (None, False, [], {}):
            raise AdapterFileError(
                f"{path}: {name} is {value!r}; this setting of {kind} is unknown here, and may "
                "change the forward pass; remove it from the file if it does not"
            )


def _check_value(path: Path, name: str, value: Any, default: Any) -> None:
    """Check a setting against the type of PEFT's default; numbers must be finite."""
    kinds = (int, float) if isinstance(default, float) or name.endswith("alpha") else type(default)
    right = isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)
    if right and isinstance(value, float):
        right = math.isfinite(value) and not (name.endswith("dropout") and not 0 <= value < 1)
    if not right:
        raise AdapterFileError(
            f"{path}: {name} is {value!r}, expected a value like {default!r}, finite, and below 1 "
            "for a probability"
        )


def read_tensors(folder: Path, allow_nonfinite: bool) -> dict[str, Tensor]:
    """Read the tensors, in new memory.

    Args:
        folder: The checkpoint's folder.
        allow_nonfinite: Whether NaN and infinity are allowed.

    Returns:
        Full name -> tensor.

    Raises:
        FileNotFoundError: If there is no file.
        AdapterFileError: If the file is damaged, or a tensor is empty or not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; pickled weights are never loaded")
    try:
        with torch.inference_mode(False):
            tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise AdapterFileError(f"{path}: is no safetensors file, or broken ({error})") from error
    if not tensors:
        raise AdapterFileError(f"{path}: holds no tensor")
    for key, tensor in tensors.items():
        if not any(tensor.shape) and tensor.ndim:
            raise AdapterFileError(
                f"{path}: {key} is empty, shape {tuple(tensor.shape)}; the file is damaged, or was "
                "saved from a sharded model without gathering it"
            )
        if not allow_nonfinite and tensor.is_floating_point() and not tensor.isfinite().all():
            raise AdapterFileError(
                f"{path}: {key} holds NaN or infinity; pass allow_nonfinite=True to read it"
            )
    return tensors


def by_module(
    tensors: Mapping[str, Tensor], peft_type: str, exists: Callable[[str], bool]
) -> list[Stored]:
    """Sort tensors by their modules.

    Args:
        tensors: Full name -> tensor.
        peft_type: The kind of the checkpoint.
        exists: Whether the model has a module at a path of the checkpoint; another path holds names
            that PEFT has put there.

    Returns:
        What there is at each module.
    """
    formats = [found for _, found in readable_formats(peft_type)]
    suffixes = {leaf.name for found in formats for leaf in found.leaves.values()}
    wholes = {found.whole for found in formats if found.whole is not None}
    found: dict[tuple[str, int], Stored] = {}
    for key, tensor in tensors.items():
        path, rest = _split(key.removeprefix(PREFIX), suffixes, wholes)
        if not exists(path):
            if _ORIGINAL in path.split("."):
                continue
            path = ".".join(part for part in path.split(".") if part != _COPY)
        depth = 0
        if rest not in suffixes and not exists(path) and path.endswith(f".{BASE}"):
            path, rest = path.removesuffix(f".{BASE}"), f"{BASE}.{rest}"
        while not exists(path) and path.endswith(f".{BASE}"):
            path, depth = path.removesuffix(f".{BASE}"), depth + 1
        path = path if exists(path) else path.replace(f".{BASE}", "")
        found.setdefault((path, depth), Stored(path, depth, {})).tensors[rest] = tensor
    return [*found.values()]


def _split(name: str, suffixes: Collection[str], wholes: Collection[str]) -> tuple[str, str]:
    """The path of a tensor's module, and the rest of the tensor's name."""
    for suffix in suffixes:
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}"), suffix
    for whole in wholes:
        path, found, parameter = name.partition(f".{whole}")
        if found:
            return path, whole + parameter
    path, _, last = name.rpartition(".")
    return path, last
