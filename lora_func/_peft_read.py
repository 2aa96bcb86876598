"""Reading PEFT's checkpoints."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_func._errors import AdapterFileError
from lora_func._frozen import frozen_parameters
from lora_func._io import trainable
from lora_func._keys import Key
from lora_func._leaves import refuse_other_leaves
from lora_func._modules import place_of, uncompiled
from lora_func._peft_formats import (
    CONFIG,
    EMBEDDED,
    FORMATS,
    PREFIX,
    WEIGHTS,
    Format,
    format_of,
    weight_of,
)
from lora_func._types import Params


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
                params |= _site_of(model, rename(path), config, theirs)
        refuse_other_leaves(params, model)
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{folder}: {error.args[0]}") from error
    return trainable(params, None)


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
    known = {found.peft_type for found in FORMATS.values()}
    if kind not in known:
        raise AdapterFileError(f"{path}: is of kind {kind!r}; read are {sorted(known)}")
    for name, harmless in _HARMLESS.items():
        if config.get(name) not in harmless:
            raise AdapterFileError(
                f"{path}: {name} is {config[name]!r}, which changes the base or the forward pass "
                "in a way that lora_func does not have"
            )
    return config


_HARMLESS: dict[str, tuple[Any, ...]] = {
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "apply_GS": (None, False),
    "block_share": (None, False),
    "coft": (None, False),
}


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; pickled weights are never loaded")
    try:
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
    model: nn.Module, path: str, config: Mapping[str, Any], theirs: Mapping[str, Tensor]
) -> Params:
    module, _ = place_of(model, path)
    for name in _candidates(config, theirs):
        found = format_of(
            name, not config.get("use_cayley_neumann"), isinstance(module, nn.Embedding)
        )
        if found is None or {leaf.name for leaf in found.leaves.values()} != theirs.keys():
            continue
        own = _pattern(config, found, path)
        leaves = {leaf: it.ours(theirs[it.name], own) for leaf, it in found.leaves.items()}
        leaves |= found.constants(own, leaves, weight_of(model, path))
        return {str(Key(path, name, leaf)): tensor for leaf, tensor in leaves.items()}
    wanted = config.get("modules_to_save") or []
    kept = any(path == name or path.endswith(f".{name}") for name in wanted)
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


def _candidates(config: Mapping[str, Any], theirs: Mapping[str, Tensor]) -> list[str]:
    """The variants that the tensors of a module may be of."""
    kind = config["peft_type"]
    if kind == "LORA":
        return ["dora" if config.get("use_dora") else "lora"]
    if kind == "IA3":
        gain = theirs.get("ia3_l")
        return ["ia3_ff" if gain is not None and gain.shape[0] == 1 else "ia3"]
    if kind == "ROAD":
        return [config.get("variant", "road_1").replace("_", "")]
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
