"""Adapters in files: the dict and nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.adapter import as_trainable, check_adapter, check_leaves, group, parse
from lora_func.configs import AdapterConfig
from lora_func.errors import AdapterFileError
from lora_func.files._container import Content, read, write
from lora_func.files._fingerprint import differences, fingerprint
from lora_func.modules import inner_model, whole
from lora_func.runtime import devices_of, layout_of
from lora_func.variant import Params, rank_of
from lora_func.variants import by_name

_KIND = "adapter"


def save(
    params: Mapping[str, Tensor],
    path: str | PathLike[str],
    *,
    model: nn.Module | None = None,
    cfg: AdapterConfig | Sequence[AdapterConfig] = (),
    metadata: Mapping[str, str] | None = None,
    allow_nonfinite: bool = False,
) -> None:
    """Write an adapter, or a stack, into a safetensors file.

    ``save`` checks every leaf: its shape must match its variant, it must hold data, and it must be
    finite (unless ``allow_nonfinite=True``). The new file is written beside the old one, read
    again, compared and renamed. If the process dies at any moment, one of the two remains.

    Args:
        params: The adapter or the stack.
        path: The path of the file; its folder must exist.
        model: The model it belongs to. ``load`` then recognises its adapted weights by their
            shapes, dtypes and a sample of their values.
        cfg: The config or configs, kept in the file.
        metadata: More text to keep in the file, by name.
        allow_nonfinite: Whether NaN and infinity are allowed.

    Raises:
        KeyError: If a key is malformed, or names no variant or nothing in the model.
        TypeError: If params is no mapping, a leaf is not a floating-point tensor, or metadata is
            not text.
        ValueError: If there is no leaf, a leaf is missing, unknown, empty, without data or not
            finite, or a shape does not fit.
        OSError: If the file cannot be written.

    Examples:
        >>> import torch, tempfile, lora_func as lf
        >>> model = torch.nn.Linear(4, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lf.save(lf.init(model, lf.LoRA(r=2)), f"{folder}/a.safetensors", model=model)
        ...     list(lf.load(f"{folder}/a.safetensors", model=model))
        ['.lora.A', '.lora.B', '.lora._scale']
    """
    configs = (cfg,) if isinstance(cfg, AdapterConfig) else cfg
    check_adapter(params)
    params = {key: whole(leaf) for key, leaf in params.items()}
    facts = facts_of(params, model, allow_nonfinite) | {
        "configs": [{"config": type(one).__name__, **asdict(one)} for one in configs]
    }
    write(Path(path), Content(_KIND, params, facts, metadata or {}))


def load(
    path: str | PathLike[str],
    *,
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
) -> Params:
    """Read an adapter, or a stack, that ``save`` wrote.

    Args:
        path: The path of the file.
        model: The model it is for. The file is refused if it was saved with other weights.
        device: The device of the leaves; None means those of the model's sites, or the CPU without
            a model.

    Returns:
        The dict, bit for bit; trained leaves require grad.

    Raises:
        FileNotFoundError: If there is no file.
        AdapterFileError: If the file is of another kind or format, is damaged, or does not fit its
            variants or the model.
    """
    content = read(Path(path), _KIND)
    check_content(path, content.tensors, content.facts, model)
    return as_trainable(content.tensors, device or devices_of(content.tensors, model))


def check_content(
    path: str | PathLike[str],
    leaves: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    model: nn.Module | None,
) -> None:
    """Check what a file holds against its variants and a model.

    Args:
        path: The path of the file, for messages.
        leaves: An adapter or a stack.
        facts: What ``facts_of`` said about it.
        model: The model, if there is one to compare with.

    Raises:
        AdapterFileError: If it does not fit.
    """
    try:
        _check(leaves, model)
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path}: {error.args[0]}") from error
    if model is not None and facts["base"] is not None:
        found = differences(fingerprint(model, leaves), facts["base"])
        if found:
            listed = "\n  ".join([*found[:5], *["..."] * (len(found) > 5)])
            raise AdapterFileError(
                f"{path}: was saved with another base; {len(found)} of its weights differ:\n"
                f"  {listed}\nload it without model= if that is meant"
            )


def facts_of(
    params: Mapping[str, Tensor], model: nn.Module | None, allow_nonfinite: bool
) -> dict[str, Any]:
    """Check an adapter before it is written, and collect what the file says about it.

    Args:
        params: The adapter or the stack.
        model: The model, if the file shall recognise it.
        allow_nonfinite: Whether NaN and infinity are allowed.

    Returns:
        JSON.

    Raises:
        KeyError: If a key is malformed, or names no variant or nothing in the model.
        TypeError: If a leaf is not a floating-point tensor.
        ValueError: If a leaf does not fit its variant, has no data, or is not finite.
    """
    _check(params, model)
    _check_data(params, allow_nonfinite)
    base = None if model is None else fingerprint(model, params)
    return {"variants": _variants(params), "base": base}


def _check_data(params: Mapping[str, Tensor], allow_nonfinite: bool) -> None:
    for key, leaf in params.items():
        if leaf.is_meta or not (leaf.numel() or _has_rank_0(key, leaf)):
            raise ValueError(f"{key}: has no data, shape {tuple(leaf.shape)} on {leaf.device}")
        wide = leaf if leaf.element_size() > 1 else leaf.float()
        if not allow_nonfinite and not wide.isfinite().all():
            raise ValueError(
                f"{key}: holds NaN or infinity; pass allow_nonfinite=True to save it all the same"
            )


def _has_rank_0(key: str, leaf: Tensor) -> bool:
    """True for a leaf without data because its site has the rank 0."""
    _, name, own = parse(key)
    return any(leaf.shape[axis] == 0 for axis in by_name(name).rank_axes.get(own, ()))


def _check(params: Mapping[str, Tensor], model: nn.Module | None) -> None:
    if model is not None:
        layout_of(inner_model(model), params)
    check_leaves(params, model)


def _variants(params: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Of each variant the config's name, the sites, the ranks, and the settings that are leaves."""
    found: dict[str, dict[str, Any]] = {}
    for (_, name), keys in group(params).items():
        variant, leaves = by_name(name), {leaf: params[key] for leaf, key in keys.items()}
        kind = variant.config.__name__
        here = found.setdefault(name, {"config": kind, "sites": 0, "ranks": [], "settings": {}})
        here["sites"] += 1
        here["ranks"] = sorted({*here["ranks"], rank_of(variant, leaves)} - {0})
        for leaf, alternatives in variant.axes.items():
            if leaf.startswith("_") and () in alternatives and leaf in leaves:
                values = here["settings"].setdefault(leaf[1:], [])
                values[:] = sorted({*values, *leaves[leaf].flatten().tolist()})
    return found
