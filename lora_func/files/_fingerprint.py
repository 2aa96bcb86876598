"""How an adapter's file recognises the base that it belongs to."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.compat import uncompiled
from lora_func.modules import original_parameters
from lora_func.runtime import Site, layout_of
from lora_func.weights import is_quantised, packed

_SAMPLES = 64


def fingerprint(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Describe the weights that an adapter changes.

    Args:
        model: The model.
        params: The adapter.

    Returns:
        Parameter -> shape, dtype or kind of code, and a hash of some of its values.

    Raises:
        KeyError: If a key names no module or parameter of the model, or no variant.
        TypeError: If a variant cannot adapt what a key names.
        ValueError: If a weight has no data.
    """
    found: dict[str, list[Any]] = {}
    for site in layout_of(uncompiled(model), params).sites:
        for name, shape, kind, tensor in _weights(site):
            if tensor.is_meta:
                raise ValueError(f"{site.path}: its weight has no data yet; load the model first")
            where = site.path if site.parameter else ".".join(filter(None, (site.path, name)))
            found[where] = [[*shape], kind, _sampled(tensor)]
    return found


def differences(model: Mapping[str, list[Any]], file: Mapping[str, list[Any]]) -> list[str]:
    """Describe where two bases differ.

    Args:
        model: The fingerprint of the model.
        file: The fingerprint in the file.

    Returns:
        One line for each parameter that differs.
    """
    lines = []
    for name in sorted(model.keys() | file.keys()):
        mine, other = model.get(name), file.get(name)
        if mine is None or other is None:
            lines.append(f"{name}: in {'the file' if mine is None else 'the model'} alone")
        elif mine[:2] != other[:2]:
            lines.append(f"{name}: {mine[1]} {tuple(mine[0])}, in the file {other[1]} {other[0]}")
        elif mine != other:
            lines.append(f"{name}: other values")
    return lines


def _weights(site: Site) -> Iterator[tuple[str, torch.Size, str, Tensor]]:
    """Name, shape, dtype and storage of each weight of a site."""
    module = site.module
    trained = site.variant.parameters is not None
    if is_quantised(module) and not trained:
        W = packed(module, site.path)
        yield "weight", W.shape, W.kind, W.codes
        return
    own = original_parameters(module)
    for name in [*site.keys] if trained else [site.parameter or "weight"]:
        found = own.get(name)
        weight = getattr(module, name) if found is None else found
        yield name, weight.shape, str(weight.dtype).removeprefix("torch."), weight


def _sampled(tensor: Tensor) -> str:
    flat = tensor.detach().reshape(-1)
    count = min(len(flat), _SAMPLES)
    places = [i * (len(flat) - 1) // max(count - 1, 1) for i in range(count)]
    values = flat[torch.tensor(places, dtype=torch.int64, device=flat.device)].cpu().contiguous()
    return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
