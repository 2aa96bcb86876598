"""How an adapter's file recognises the base that it belongs to."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.modules import inner_model, original_parameters, whole
from lora_func.runtime import Site, layout_of
from lora_func.weights import is_quantised, loaded, packed

_SAMPLES = 64


def fingerprint(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Describe the weights that an adapter changes and does not hold itself.

    What a leaf replaces has no part in the base: a head with other values is the same base.

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
    for site in layout_of(inner_model(model), params).sites:
        if site.variant.parameters is not None:
            continue
        with loaded(site.module):
            name, shape, kind, tensor = _weight(site)
            if tensor.is_meta:
                raise ValueError(f"{site.path}: its weight has no data yet; load the model first")
            where = site.path if site.parameter else ".".join(filter(None, (site.path, name)))
            found[where] = [[*shape], kind, _sampled(tensor)]
    return found


def differences(model: Mapping[str, list[Any]], file: Mapping[str, list[Any]]) -> list[str]:
    """Describe where two bases differ.

    Args:
        model: The fingerprint of the model.
        file: The fingerprint in the file; what only the file names is left out.

    Returns:
        One line for each parameter that differs.
    """
    lines = []
    for name, mine in sorted(model.items()):
        other = file.get(name)
        if other is None:
            lines.append(f"{name}: in the model alone")
        elif mine[:2] != other[:2]:
            lines.append(f"{name}: {mine[1]} {tuple(mine[0])}, in the file {other[1]} {other[0]}")
        elif mine != other:
            lines.append(f"{name}: other values")
    return lines


def _weight(site: Site) -> tuple[str, torch.Size, str, Tensor]:
    """Name, shape, dtype and storage of the weight of a site."""
    module, name = site.module, site.parameter or "weight"
    if is_quantised(module):
        W = packed(module, site.path)
        return name, W.shape, W.kind, W.codes
    found = original_parameters(module).get(name)
    weight = getattr(module, name) if found is None else found
    return name, weight.shape, str(weight.dtype).removeprefix("torch."), weight


def _sampled(tensor: Tensor) -> str:
    flat = whole(tensor).detach().reshape(-1)
    count = min(len(flat), _SAMPLES)
    places = [i * (len(flat) - 1) // max(count - 1, 1) for i in range(count)]
    values = flat[torch.tensor(places, dtype=torch.int64, device=flat.device)].cpu().contiguous()
    return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
