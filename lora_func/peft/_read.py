"""Reading PEFT's checkpoints."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.adapter import SHARED, Key, as_trainable, check_leaves, parse
from lora_func.errors import AdapterFileError
from lora_func.modules import find_site, inner_model, original_parameters, shared_parameters
from lora_func.peft._formats import CONFIG, INERT, PREFIX, WEIGHTS, all_formats, readable_formats
from lora_func.runtime import devices_of, layout_of
from lora_func.variant import Params, PeftFormat
from lora_func.variants import full
from lora_func.weights import weight_at


def from_peft(folder_or_id: str | PathLike[str], model: nn.Module) -> Params:
    """Read a checkpoint that PEFT or ``to_peft`` wrote.

    Args:
        folder_or_id: Its folder, or its name on the Hugging Face hub.
        model: The base model, not wrapped by PEFT.

    Returns:
        The adapter, in the dtypes of the checkpoint and on the devices of the model; it computes
        what PEFT computes.

    Raises:
        FileNotFoundError: If a file is missing.
        AdapterFileError: If no variant reads its kind, its tensors are not what the config says, or
            they do not fit the model.
    """
    folder, model = _downloaded(folder_or_id), inner_model(model)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    params: Params = {}
    for variant, found in readable_formats(config["peft_type"]):
        for leaf, name in found.shared.items():
            params[str(Key(SHARED, variant.name, leaf))] = _taken(folder, tensors, name)
    try:
        rename = _renaming(model, [key.removeprefix(PREFIX) for key in tensors])
        for path, stored in _by_module(tensors, config).items():
            if path.endswith(_BASE):
                _check_base(model, rename(path.removesuffix(_BASE)), stored)
            else:
                params |= _site_of(model, path, rename(path), config, stored)
        params = _tied_once(model, params)
        layout_of(model, params)
        check_leaves(params, model)
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{folder}: {error.args[0]}") from error
    return as_trainable(params, devices_of(params, model))


def _downloaded(folder_or_id: str | PathLike[str]) -> Path:
    folder = Path(folder_or_id)
    if folder.is_dir() or not isinstance(folder_or_id, str):
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(folder_or_id, allow_patterns=[CONFIG, WEIGHTS]))


def _read_config(folder: Path) -> dict[str, Any]:
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
    inert = dict(INERT)
    for found in formats:
        config, inert = {**found.defaults, **config}, {**inert, **found.inert}
    for name, harmless in inert.items():
        if config.get(name) not in harmless:
            raise AdapterFileError(
                f"{path}: {name} is {config[name]!r}; this setting changes the base or the forward "
                f"pass, and is read only at {harmless}"
            )
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; pickled weights are never loaded")
    try:
        with torch.inference_mode(False):
            return {key: tensor.clone() for key, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise AdapterFileError(f"{path}: is no safetensors file, or broken ({error})") from error


def _taken(folder: Path, tensors: dict[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise AdapterFileError(f"{folder}: has no {key!r}; save it with save_projection=True")
    return tensors.pop(key)


def _renaming(model: nn.Module, keys: Sequence[str]) -> Callable[[str], str]:
    """From a checkpoint's names to the model's, which may lack or add the name of its base."""
    base = f"{getattr(model, 'base_model_prefix', '')}."
    names = [name for name, _ in model.named_modules() if name]

    def fits(rename: Callable[[str], str]) -> bool:
        return all(any(rename(key).startswith(f"{name}.") for name in names) for key in keys)

    ways: tuple[Callable[[str], str], ...] = (
        lambda path: path,
        lambda path: path.removeprefix(base),
        lambda path: base + path,
    )
    return next(filter(fits, ways), ways[0])


def _by_module(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """Tensors by the path of their module and by the rest of their name."""
    suffixes = [
        leaf.name
        for _, found in readable_formats(config["peft_type"])
        for leaf in found.leaves.values()
    ]
    by_module: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        suffix = next((s for s in suffixes if name.endswith(f".{s}")), name.rpartition(".")[2])
        by_module.setdefault(name.removesuffix(suffix).rstrip("."), {})[suffix] = tensor
    return by_module


def _site_of(
    model: nn.Module,
    peft_path: str,
    path: str,
    config: Mapping[str, Any],
    stored: Mapping[str, Tensor],
) -> Params:
    module, _ = find_site(model, path)
    for variant, found in readable_formats(config["peft_type"]):
        names = {leaf.name for leaf in found.leaves.values()}
        fits = names == stored.keys() and found.embedding == isinstance(module, nn.Embedding)
        if not fits or not found.means(config, peft_path):
            continue
        own = _at_site(config, found, peft_path)
        leaves = {leaf: it.read(stored[it.name], own) for leaf, it in found.leaves.items()}
        with torch.no_grad():
            leaves |= found.constants(own, leaves, weight_at(model, path))
        return {str(Key(path, variant.name, leaf)): tensor for leaf, tensor in leaves.items()}
    wanted = config.get("modules_to_save") or []
    kept = any(f".{name}." in f".{peft_path}." for name in wanted)
    if not kept or not stored.keys() <= original_parameters(module).keys():
        raise ValueError(f"{path}: its tensors {[*stored]} are not what the config says")
    return {str(Key(path, _FULL, name)): tensor for name, tensor in stored.items()}


_BASE = ".base_layer"
"""The name under which PEFT writes the weight of an adapted embedding."""

_FULL = full.VARIANT.name


def _check_base(model: nn.Module, path: str, stored: Mapping[str, Tensor]) -> None:
    module, _ = find_site(model, path)
    own = original_parameters(module)
    for name, tensor in stored.items():
        if name not in own or not torch.equal(own[name].detach().cpu(), tensor.to(own[name].dtype)):
            raise ValueError(
                f"{path}.{name}: the checkpoint holds another weight than the model; load the "
                "checkpoint's into the model first"
            )


def _tied_once(model: nn.Module, params: Params) -> Params:
    """Keep one of the copies of a tied parameter, if they are equal; PEFT trains each copy."""
    places, names = shared_parameters(model), {id(m): name for name, m in model.named_modules()}
    kept = dict(params)
    for key in params:
        path, variant, leaf = parse(key)
        if variant != _FULL or key not in kept:
            continue
        others = [
            str(Key(names[id(m)], _FULL, n)) for m, n in places[model.get_submodule(path), leaf]
        ]
        if any(o not in params or not torch.equal(params[o], params[key]) for o in others):
            raise ValueError(
                f"{path}.{leaf}: is tied in the model, and {others} in the checkpoint are not all "
                "there, or not equal; untie them in the model first"
            )
        for other in others[1:]:
            kept.pop(other, None)
    return kept


def _at_site(config: Mapping[str, Any], found: PeftFormat, path: str) -> dict[str, Any]:
    """The config for one site, with its exceptions."""
    own = dict(config)
    for name, pattern in found.patterns.items():
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", path):
                own[name] = value
                break
    return own
