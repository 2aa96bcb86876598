"""Adapters in files: the dict as it is."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.adapter._keys import group, parse
from lora_func.adapter._schema import refuse_other_leaves
from lora_func.configs import AdapterConfig
from lora_func.errors import AdapterFileError
from lora_func.files._container import Content, read, write
from lora_func.files._fingerprint import differences, fingerprint
from lora_func.variant import Params, rank_of
from lora_func.variants import by_name

ADAPTER = "adapter"


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

    The file is written beside, read again and compared before it takes its place: whenever the
    process dies, the old file or the new one stands there.

    Args:
        params: The adapter or the stack.
        path: Where; its folder must exist.
        model: The model it belongs to, whose weights ``load`` then knows again by their shapes,
            dtypes and a sample of their values.
        cfg: What it was made from, to be remembered.
        metadata: What else is to be remembered, as text.
        allow_nonfinite: Whether NaN and infinity may be written.

    Raises:
        KeyError: If a key is malformed, or names no variant or nothing in the model.
        TypeError: If a leaf is no floating-point tensor, or metadata is no text.
        ValueError: If there is no leaf, one is missing, unknown, empty, without data or not finite,
            or a shape does not fit.
        OSError: If the file cannot be written.

    Example:
        >>> import torch, tempfile, lora_func as lf
        >>> model = torch.nn.Linear(4, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lf.save(lf.init(model, lf.LoRA(r=2)), f"{folder}/a.safetensors", model=model)
        ...     list(lf.load(f"{folder}/a.safetensors", model=model))
        ['.lora.A', '.lora.B', '.lora._scale']
    """
    configs = (cfg,) if isinstance(cfg, AdapterConfig) else cfg
    facts = facts_of(params, model, allow_nonfinite) | {
        "configs": [{"config": type(one).__name__, **asdict(one)} for one in configs]
    }
    write(Path(path), Content(ADAPTER, params, facts, metadata or {}))


def load(
    path: str | PathLike[str],
    *,
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
) -> Params:
    """Read an adapter, or a stack, that ``save`` has written.

    Args:
        path: Where.
        model: The model it is for; refused if its weights are not those that it was saved with.
        device: Where to put the leaves; on the CPU if not said.

    Returns:
        The dict, bit for bit; trained leaves require grad.

    Raises:
        FileNotFoundError: If there is no file.
        AdapterFileError: If it is another file, of another format or damaged, or does not fit its
            variants or the model.
    """
    content = read(Path(path), ADAPTER)
    refuse_unfitting(path, content.tensors, content.facts, model)
    return trainable(content.tensors, device)


def refuse_unfitting(
    path: str | PathLike[str],
    leaves: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    model: nn.Module | None,
) -> None:
    """Refuse what a file holds, if it is not what its variants say, or made for another model.

    Args:
        path: Of the file, for messages.
        leaves: An adapter or a stack.
        facts: What ``facts_of`` said of it.
        model: The model, if there is one to compare with.

    Raises:
        AdapterFileError: If it does not fit.
    """
    try:
        refuse_other_leaves(leaves, model)
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


def trainable(leaves: Mapping[str, Tensor], device: str | torch.device | None = None) -> Params:
    """Return leaves as ``init`` would: on a device, trained ones requiring grad.

    Args:
        leaves: The leaves; they become the adapter's.
        device: Where to put them; as they are if not said.
    """
    with torch.inference_mode(False):
        return {
            key: leaf.to(device).requires_grad_(not parse(key).is_constant)
            for key, leaf in leaves.items()
        }


def facts_of(
    params: Mapping[str, Tensor], model: nn.Module | None, allow_nonfinite: bool
) -> dict[str, Any]:
    """Check an adapter that is to be written, and say what the file is to say of it.

    Args:
        params: The adapter or the stack.
        model: The model, if it is to be known again.
        allow_nonfinite: Whether NaN and infinity may be written.

    Returns:
        JSON.

    Raises:
        KeyError: If a key is malformed, or names no variant or nothing in the model.
        TypeError: If a leaf is no floating-point tensor.
        ValueError: If it is not what its variants say, has no data, or is not finite.
    """
    refuse_other_leaves(params, model)
    _refuse_unsavable(params, allow_nonfinite)
    base = None if model is None else fingerprint(model, params)
    return {"variants": _variants(params), "base": base}


def _refuse_unsavable(params: Mapping[str, Tensor], allow_nonfinite: bool) -> None:
    for key, leaf in params.items():
        if leaf.is_meta or not leaf.numel():
            raise ValueError(f"{key}: has no data, shape {tuple(leaf.shape)} on {leaf.device}")
        wide = leaf if leaf.element_size() > 1 else leaf.float()
        if not allow_nonfinite and not wide.isfinite().all():
            raise ValueError(
                f"{key}: holds NaN or infinity; pass allow_nonfinite=True to save it all the same"
            )


def _variants(params: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The number of sites and the ranks of each variant."""
    found: dict[str, dict[str, Any]] = {}
    for (_, name), keys in group(params).items():
        rank = rank_of(by_name(name), {leaf: params[key] for leaf, key in keys.items()})
        here = found.setdefault(name, {"sites": 0, "ranks": []})
        here["sites"] += 1
        here["ranks"] = sorted({*here["ranks"], rank} - {0})
    return found
