"""Reading PEFT's checkpoints."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.adapter._keys import Key, parse
from lora_func.adapter._schema import refuse_other_leaves, weight_at
from lora_func.errors import AdapterFileError
from lora_func.files._adapters import trainable
from lora_func.modules import place_of, uncompiled
from lora_func.peft._formats import (
    CONFIG,
    DEFAULTS,
    EMBEDDED,
    FORMATS,
    HARMLESS,
    PREFIX,
    WEIGHTS,
    Format,
    format_of,
)
from lora_func.runtime._frozen import frozen_parameters, shared_parameters
from lora_func.variant import Params


def from_peft(folder_or_id: str | PathLike[str], model: nn.Module) -> Params:
    """Read a checkpoint that PEFT has written, or ``to_peft``.

    Args:
        folder_or_id: Its folder, or its name on the Hugging Face hub.
        model: The base model, as it was before PEFT wrapped it.

    Returns:
        The adapter, in the dtypes of the checkpoint; what PEFT computes is what it computes.

    Raises:
        FileNotFoundError: If a file is missing.
        AdapterFileError: If it is of a kind that we have not, its tensors are not what the config
            says, or they do not fit the model.
    """
    folder, model = _downloaded(folder_or_id), uncompiled(model)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    params: Params = {}
    if config["peft_type"] == "VERA":
        for name in ("_A", "_B"):
            params[str(Key("*", "vera", name))] = _taken(folder, tensors, f"base_model.vera{name}")
    try:
        rename = _renaming(model, [key.removeprefix(PREFIX) for key in tensors])
        for path, theirs in _by_module(tensors, config).items():
            if path.endswith(_BASE):
                _refuse_other_base(model, rename(path.removesuffix(_BASE)), theirs)
            else:
                params |= _site_of(model, path, rename(path), config, theirs)
        params = _tied_once(model, params)
        refuse_other_leaves(params, model)
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{folder}: {error.args[0]}") from error
    return trainable(params)


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
    config = DEFAULTS.get(kind, {}) | config
    known = {found.peft_type for found in FORMATS.values()}
    if kind not in known:
        raise AdapterFileError(f"{path}: is of kind {kind!r}; read are {sorted(known)}")
    for name, harmless in HARMLESS.items():
        if config.get(name) not in harmless:
            raise AdapterFileError(
                f"{path}: {name} is {config[name]!r}, which changes the base or the forward pass "
                "in a way that lora_func does not have"
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
    """From a checkpoint's names to the model's, which may have or lack the name of its base."""
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
    """Their tensors by module and by what follows its path; parameters by their own names."""
    suffixes = [
        leaf.name
        for found in (*FORMATS.values(), EMBEDDED)
        if found.peft_type == config["peft_type"]
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
    their_path: str,
    path: str,
    config: Mapping[str, Any],
    theirs: Mapping[str, Tensor],
) -> Params:
    module, _ = place_of(model, path)
    exact, embedded = not config.get("use_cayley_neumann"), isinstance(module, nn.Embedding)
    for name in _candidates(config, their_path):
        found = format_of(name, exact, embedded)
        if found is None or {leaf.name for leaf in found.leaves.values()} != theirs.keys():
            continue
        own = _pattern(config, found, their_path)
        leaves = {leaf: it.ours(theirs[it.name], own) for leaf, it in found.leaves.items()}
        leaves |= found.constants(own, leaves, weight_at(model, path))
        return {str(Key(path, name, leaf)): tensor for leaf, tensor in leaves.items()}
    wanted = config.get("modules_to_save") or []
    kept = any(f".{name}." in f".{their_path}." for name in wanted)
    if not kept or not theirs.keys() <= frozen_parameters(module).keys():
        raise ValueError(f"{path}: its tensors {[*theirs]} are not what the config says")
    return {str(Key(path, "full", name)): tensor for name, tensor in theirs.items()}


_BASE = ".base_layer"
"""Under which PEFT writes the weight of an adapted embedding."""


def _refuse_other_base(model: nn.Module, path: str, theirs: Mapping[str, Tensor]) -> None:
    module, _ = place_of(model, path)
    own = frozen_parameters(module)
    for name, tensor in theirs.items():
        if name not in own or not torch.equal(own[name].detach().cpu(), tensor.to(own[name].dtype)):
            raise ValueError(
                f"{path}.{name}: the checkpoint brings one of its own, and it is not the model's; "
                "load that into the model first"
            )


def _tied_once(model: nn.Module, params: Params) -> Params:
    """Keep one of the copies that PEFT trains of a tied parameter, if they are the same."""
    places, names = shared_parameters(model), {id(m): name for name, m in model.named_modules()}
    kept = dict(params)
    for key in params:
        path, variant, leaf = parse(key)
        if variant != "full" or key not in kept:
            continue
        parameter = frozen_parameters(model.get_submodule(path))[leaf]
        others = [str(Key(names[id(m)], "full", n)) for m, n in places[id(parameter)]]
        if any(o not in params or not torch.equal(params[o], params[key]) for o in others):
            raise ValueError(
                f"{path}.{leaf}: is tied in the model, and {others} in the checkpoint are not all "
                "there, or not the same; untie them in the model first"
            )
        for other in others[1:]:
            kept.pop(other, None)
    return kept


def _candidates(config: Mapping[str, Any], path: str) -> list[str]:
    """The variants that the tensors of a module may be of."""
    kind = config["peft_type"]
    if kind == "LORA":
        return ["dora" if config.get("use_dora") else "lora"]
    if kind == "IA3":
        inputs = config.get("feedforward_modules") or []
        if isinstance(inputs, str):
            on_inputs = re.fullmatch(inputs, path) is not None
        else:
            on_inputs = path.endswith(tuple(inputs))
        return ["ia3_ff" if on_inputs else "ia3"]
    if kind == "ROAD":
        return [config["variant"].replace("_", "")]
    return [name for name, found in FORMATS.items() if found.peft_type == kind]


def _pattern(config: Mapping[str, Any], found: Format, path: str) -> dict[str, Any]:
    """The config as it is for one site."""
    own = dict(config)
    for name, pattern in found.patterns.items():
        for key, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", path):
                own[name] = value
                break
    return own
