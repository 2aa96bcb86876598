"""The state dict of a model whose own weights do what the adapter does."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_func.checks import check_choice
from lora_func.modules import inner_model, original_parameters, shared_parameters, whole
from lora_func.runtime import Replacement, Site, check_single, replacements
from lora_func.weights import affine, dense, is_quantised, loaded


def merge(
    model: nn.Module,
    params: Mapping[str, Tensor],
    *,
    tied: Literal["error", "untie"] = "error",
    ranks: Literal["all", 0] = "all",
    finite: bool = False,
) -> dict[str, Tensor]:
    """Compute the state dict with which the model does what it does with the adapter.

    A quantised model gives dequantised floating-point weights, for the dense model of the same
    architecture: nothing is merged into quantised storage. These are the weights on which the
    adapter was trained, not those of the checkpoint before quantisation.

    Args:
        model: The model; only read.
        params: The adapter.
        tied: What to do if an adapter changes one place of a tied weight: "error", or "untie".
            After "untie" the places differ, and the model must load them untied.
        ranks: Who gets the result, if the base is sharded over ranks, which all call this: "all",
            or rank 0 alone; the others then get an empty dict.
        finite: Whether an adapted weight with NaN or infinity is refused.

    Returns:
        New tensors under the names of ``model.state_dict()``, and one more for each new bias. Names
        that share a tensor in the model share one here.

    Raises:
        KeyError: If a key names no module or parameter of the model, or no variant.
        TypeError: If a variant has no weight, because it is not linear in x, or a weight is
            computed when it is read.
        ValueError: If params is a stack, a leaf is missing, unknown or of another shape, a tied
            weight would be untied or is adapted at two places, two variants name one module, or an
            adapted weight must be finite and is not.

    Examples:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> params = lf.init(model, lf.LoRA(r=2))
        >>> model.load_state_dict(lf.merge(model, params))
        <All keys matched successfully>
    """
    check_choice("tied", tied, ("error", "untie"))
    check_choice("ranks", ranks, ("all", 0))
    model = inner_model(model)
    with torch.no_grad():
        sites = check_single(params, model).sites
        _check_tied_sites(sites)
        changed = replacements(model, sites, params)
        if tied == "error":
            _check_tied(model, changed)
        if finite:
            _check_finite(model, changed)
        state = _dense_state(model)
        names = _names(model)
        copies = {id(tensor): tensor.clone() for _, new, _ in changed for tensor in new.values()}
        for module, new, _ in changed:
            for name, tensor in new.items():
                state.update(dict.fromkeys(names[id(module), name], copies[id(tensor)]))
    return state if ranks == "all" or _rank() == 0 else {}


def _rank() -> int:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if there else 0


def _check_tied_sites(sites: Iterable[Site]) -> None:
    """Check that no parameter has one adapter at all its places and another at one place."""
    owners: dict[int, Site] = {}
    for site in sites:
        own = original_parameters(site.module)
        trained = site.variant.parameters is not None
        for name in site.keys if trained else [site.parameter or "weight"]:
            other = owners.setdefault(id(own.get(name)), site)
            if other is not site and (site.everywhere or other.everywhere):
                raise ValueError(
                    f"{site.path}: adapts the parameter that {other.path!r} adapts, which is tied "
                    "to it; a state dict cannot hold both"
                )


def _names(model: nn.Module) -> dict[tuple[int, str], list[str]]:
    """The names in the state dict of each module's parameters."""
    names: dict[tuple[int, str], list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name in original_parameters(module):
            names.setdefault((id(module), name), []).append(f"{path}.{name}" if path else name)
    return names


def _dense_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict, dequantised, in which what was one tensor is one tensor."""
    modules = model.named_modules(remove_duplicate=False)
    quantised = {f"{path}." if path else "": m for path, m in modules if is_quantised(m)}
    weights = {id(m): dense(affine(m, prefix[:-1])) for prefix, m in quantised.items()}
    copies: dict[int, Any] = {}
    state: dict[str, Any] = {}
    offloaded = _offloaded_state(model)
    for key, tensor in (model.state_dict(keep_vars=True) | offloaded).items():
        prefix = next((prefix for prefix in quantised if key.startswith(prefix)), None)
        if prefix is not None and key == f"{prefix}weight":
            state[key] = weights[id(quantised[prefix])]
        elif prefix is None or key == f"{prefix}bias":
            is_tensor = isinstance(tensor, Tensor)
            copied = whole(tensor).detach().clone() if is_tensor else deepcopy(tensor)
            state[key] = copies.setdefault(id(tensor), copied)
    return state


def _offloaded_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of the parameters that accelerate keeps elsewhere."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        absent = [n for n, p in original_parameters(module).items() if p is not None and p.is_meta]
        with loaded(module):
            own = original_parameters(module)
            found |= {prefix + name: own[name].detach().cpu() for name in absent}
    return found


def _check_finite(model: nn.Module, changed: Iterable[Replacement]) -> None:
    names = _names(model)
    for module, new, _ in changed:
        for name, tensor in new.items():
            if not tensor.isfinite().all():
                raise ValueError(
                    f"{names[id(module), name][0]}: would hold NaN or infinity; the leaves "
                    "diverged, or the change exceeds the range of its dtype"
                )


def _check_tied(model: nn.Module, changed: Iterable[Replacement]) -> None:
    places, names = shared_parameters(model), _names(model)
    moved = {(id(module), name): t for module, new, _ in changed for name, t in new.items()}
    for module, new, _ in changed:
        for name, tensor in new.items():
            for other, alias in places.get((module, name), ()):
                mine, theirs = names[id(module), name][0], names[id(other), alias][0]
                there = moved.get((id(other), alias))
                if there is None:
                    raise ValueError(
                        f"{mine}: tied to {theirs}, which the adapter does not change; pass "
                        "tied='untie' for a state dict in which they differ, or name the "
                        "parameter with target_parameters to change both"
                    )
                if there is not tensor and not torch.equal(there, tensor):
                    raise ValueError(
                        f"{mine}: tied to {theirs}, which the adapter changes to other values; "
                        "pass tied='untie' for a state dict in which they differ"
                    )
