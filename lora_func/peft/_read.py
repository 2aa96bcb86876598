"""Reading PEFT's checkpoints."""

import re
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_func.adapter import SHARED, Key, as_trainable, check_leaves, parse
from lora_func.errors import AdapterFileError
from lora_func.modules import find_site, inner_model
from lora_func.peft._checkpoint import Stored, by_module, read_config, read_tensors
from lora_func.peft._formats import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    at_site,
    is_targeted,
    layer_of,
    readable_formats,
    sizes_of,
    targeted_parameters,
)
from lora_func.peft._numbered import with_paths
from lora_func.peft._promises import check_promises
from lora_func.peft._tied import mirrored_once
from lora_func.peft._tokens import KIND, read_tokens
from lora_func.peft._whole import FULL, check_no_buffer, tied_once, whole_parameters
from lora_func.runtime import devices_of, layout_of
from lora_func.variant import Params, PeftFormat
from lora_func.weights import loaded, weight_at


def from_peft(
    folder_or_id: str | PathLike[str], model: nn.Module, *, allow_nonfinite: bool = False
) -> Params:
    """Read a checkpoint that PEFT or ``to_peft`` wrote.

    Args:
        folder_or_id: Its folder, or its name on the Hugging Face hub.
        model: The base model, not wrapped by PEFT.
        allow_nonfinite: Whether NaN and infinity are allowed.

    Returns:
        The adapter, in the dtypes of the checkpoint and on the devices of the model; it computes
        what PEFT computes.

    Raises:
        FileNotFoundError: If a file is missing.
        AdapterFileError: If no variant reads its kind, a setting is unknown, the tensors are not
            those that the config promises, or they do not fit the model.
    """
    folder, model = _downloaded(folder_or_id), inner_model(model)
    config = read_config(folder)
    tensors = read_tensors(folder, allow_nonfinite)
    params: Params = {}
    formats = readable_formats(config["peft_type"])
    for variant, found in formats:
        for leaf, name in found.shared.items() if found.means(config, SHARED) else ():
            params[str(Key(SHARED, variant.name, leaf))] = _taken(folder, tensors, name)
    try:
        at_paths = [key.removeprefix(PREFIX) for key in tensors if key.startswith(PREFIX)]
        names = _names(model, at_paths)
        numbered = [found for _, found in formats]
        tensors = with_paths(model, tensors, numbered, names.to_model)
        rows, paths = read_tokens(model, config, tensors, names.to_model, PREFIX)
        params |= rows
        adapted = paths if config["peft_type"] == KIND else set()
        modules = {path for path, _ in model.named_modules()}
        at = by_module(tensors, config["peft_type"], lambda path: names.to_model(path) in modules)
        for stored in at:
            params |= _module(model, config, names, stored, adapted)
        trained = {(key.site, key.leaf) for key in map(parse, params) if key.variant == FULL}
        check_promises(model, config, names.to_peft, adapted, tensors, trained)
        params = tied_once(model, mirrored_once(model, config, params))
        layout_of(model, params)
        check_leaves(params, model)
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{folder}: {error.args[0]}") from error
    return as_trainable(params, devices_of(params, model))


def _downloaded(folder_or_id: str | PathLike[str]) -> Path:
    folder = Path(folder_or_id)
    if folder.is_dir() or not isinstance(folder_or_id, str):
        return folder
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", folder_or_id):
        raise AdapterFileError(
            f"{folder_or_id}: is no folder; a name on the hub has the form owner/name"
        )
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(folder_or_id, allow_patterns=[CONFIG, WEIGHTS]))


def _taken(folder: Path, tensors: dict[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise AdapterFileError(f"{folder}: has no {key!r}; save it with save_projection=True")
    return tensors.pop(key)


class _Names(NamedTuple):
    """From a checkpoint's paths to the model's, and back; either may lack the name of the base."""

    to_model: Callable[[str], str]
    to_peft: Callable[[str], str]


def _names(model: nn.Module, keys: Sequence[str]) -> _Names:
    base = f"{getattr(model, 'base_model_prefix', '')}."
    paths = [name for name, _ in model.named_modules() if name]

    def same(path: str) -> str:
        return path

    def shorter(path: str) -> str:
        return path.removeprefix(base)

    def longer(path: str) -> str:
        return base + path

    def fits(names: _Names) -> bool:
        there = (names.to_model(key) for key in keys)
        return all(any(name.startswith(f"{path}.") for path in paths) for name in there)

    ways = _Names(same, same), _Names(shorter, longer), _Names(longer, shorter)
    return next(filter(fits, ways), ways[0])


def _module(
    model: nn.Module, config: Mapping[str, Any], names: _Names, stored: Stored, adapted: set[str]
) -> Params:
    """The leaves at one module; adds the sites of an adapter to ``adapted``."""
    kind, path = config["peft_type"], names.to_model(stored.path)
    formats = readable_formats(kind)
    leaf_names = {leaf.name for _, found in formats for leaf in found.leaves.values()}
    adapter = {rest: t for rest, t in stored.tensors.items() if rest in leaf_names}
    copies = {name for _, found in formats for name in found.copies}
    others = {k: t for k, t in stored.tensors.items() if k not in leaf_names | copies}
    _check_named(model, path, stored, kind)
    params: Params = {}
    for _, found in formats:
        for rest in [rest for rest in others if rest.startswith(found.whole or "/")]:
            adapted.add(path)
            inside, _, name = rest.removeprefix(found.whole or "").rpartition(".")
            site = f"{path}.{inside}" if inside else path
            check_no_buffer(site, find_site(model, site)[0], name)
            params[str(Key(site, FULL, name))] = others.pop(rest)
    if adapter:
        module, _ = find_site(model, path)
        parameters = targeted_parameters(config, stored.path, module)
        site, peft_path = path, stored.path
        layer = layer_of(model, path)
        if layer == "in_proj":
            site = f"{path}.in_proj_weight"
        elif layer == "out_proj" and not is_targeted(config, stored.path.rpartition(".")[0]):
            raise ValueError(
                f"{path}: torch's attention reads this weight past its module, so PEFT's adapter "
                "has no effect there; leave it out of target_modules and of the file"
            )
        elif parameters:
            # the first of several parameters is the innermost
            name = parameters[max(len(parameters) - 1 - stored.depth, 0)]
            site, peft_path = f"{path}.{name}", f"{stored.path}.{name}"
        adapted.add(site)
        params |= _site(model, config, peft_path, site, adapter)
    return params | whole_parameters(config, model, stored.path, path, others)


def _check_named(model: nn.Module, path: str, stored: Stored, kind: str) -> None:
    try:
        find_site(model, path)
    except KeyError as error:
        held = [f"{stored.path}.{rest}" for rest in stored.tensors]
        raise ValueError(
            f"the checkpoint holds {held}, whose names end like no tensor of {kind} that is read; "
            f"{error.args[0]}"
        ) from None


def _site(
    model: nn.Module,
    config: Mapping[str, Any],
    peft_path: str,
    site: str,
    stored: Mapping[str, Tensor],
) -> Params:
    layer, sizes, module = layer_of(model, site), sizes_of(model, site), find_site(model, site)[0]
    for variant, found in readable_formats(config["peft_type"]):
        names = {leaf.name for leaf in found.leaves.values()}
        fits = names == stored.keys() and layer in found.layers
        if not (fits and found.accepts(config) and found.means(config, peft_path)):
            continue
        if why := found.refuses(module):
            raise ValueError(f"{site}: {why}; its adapter has no equal here")
        own = at_site(config, found, peft_path)
        try:
            leaves = {
                leaf: it.from_peft(stored[it.name], own, sizes) for leaf, it in found.leaves.items()
            }
        except (RuntimeError, IndexError) as error:
            shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
            raise ValueError(f"{site}: tensors of shapes {shapes} do not fit: {error}") from error
        with torch.no_grad(), loaded(module):
            W = weight_at(model, site)
            try:
                leaves |= found.constants(own, leaves, W)
            except ValueError as error:
                raise ValueError(f"{site}: {error}") from None
            d_out, d_in = W.weight.shape[-2:]
            rank = found.settings_at(leaves, (d_out, d_in), sizes).get("r")
        _check_rank(site, found, rank, own.get("r"))
        return {str(Key(site, variant.name, leaf)): tensor for leaf, tensor in leaves.items()}
    raise ValueError(
        f"{site}: its tensors {[*stored]} are not what the config says of a {layer} layer"
    )


def _check_rank(site: str, found: PeftFormat, rank: int | None, given: int | None) -> None:
    lower = found.lowers_rank and (rank or 0) < (given or 0)
    if rank is not None and given and rank != given and not lower:
        raise ValueError(f"{site}: has rank {rank}, the config says {given}")
