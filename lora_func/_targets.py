"""Which sites of a model a config names."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lora_func._config import (
    ALL_LINEAR,
    AdapterConfig,
    LinearConfig,
    ParameterConfig,
    as_tuple,
)
from lora_func._patterns import first_match, kind, require_matches, some
from lora_func._roles import role_of
from lora_func._transforms import uncompiled
from lora_func._weight import is_linear
from lora_func.variants import by_config

_log = logging.getLogger("lora_func")


class Target(NamedTuple):
    """One site that a config names.

    Attributes:
        site: Path of the module, as ``named_modules()`` gives it.
        pattern: The first pattern that matched.
        layer: Index of the layer it stands in, or None outside any stack of layers.
        parameters: Names of the module's own parameters that are trained themselves, if any.
    """

    site: str
    pattern: str
    layer: int | None
    parameters: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What patterns are searched in: the path, or the full names of the parameters."""
        prefix = f"{self.site}." if self.site else ""
        return tuple(prefix + parameter for parameter in self.parameters) or (self.site,)


@dataclass(frozen=True)
class Targets:
    """The sites that a config names in a model, in the model's order; iterable and sized.

    Attributes:
        sites: The sites.
        left_out: What "all-linear" passed over: path -> reason.
    """

    sites: tuple[Target, ...]
    left_out: Mapping[str, str]

    def __iter__(self) -> Iterator[Target]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def find_targets(model: nn.Module, cfg: AdapterConfig) -> Targets:
    """Find the sites that a config names.

    Args:
        model: Any module; only read.
        cfg: The config of a registered variant.

    Returns:
        The sites, each with the pattern and the layer index that matched, and what "all-linear"
        left out; the latter is logged as well.

    Raises:
        TypeError: If cfg is no config of a registered variant, or a pattern names a linear layer
            of a kind that cannot be adapted.
        ValueError: If a pattern, a layer index or a role matches nothing, no site is left, or a
            parameter to train is tied to another.

    Example:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)
        ... )
        >>> [target.site for target in lf.find_targets(model, lf.LoRA(layers=-1))]
        ['2']
    """
    by_config(cfg)
    model = uncompiled(model)
    left_out: dict[str, str] = {}
    if isinstance(cfg, ParameterConfig):
        names = [name for name, _ in model.named_parameters()]
        found = _trained_parameters(model, cfg)
    elif isinstance(cfg, LinearConfig):
        names = [name for name, _ in model.named_modules()]
        found, left_out = _linear_modules(model, cfg)
    else:
        raise TypeError(
            f"{type(cfg).__name__} names no sites; derive it from LinearConfig or ParameterConfig"
        )
    sites = _of_layers(model, cfg, found)
    kept = [name for target in sites for name in target.names]
    others = dict.fromkeys(names, "left out by exclude_modules, target_roles or layers")
    for field, patterns in cfg.site_patterns().items():
        require_matches(field, patterns, kept, others)
    if left_out:
        _log.info('"all-linear" left out %s', left_out)
    return Targets(tuple(sites), left_out)


def _linear_modules(model: nn.Module, cfg: LinearConfig) -> tuple[Sequence[Target], dict[str, str]]:
    modules = dict(model.named_modules())
    linear = {path: m for path, m in modules.items() if isinstance(m, nn.Linear) or is_linear(m)}
    wanted, unwanted = as_tuple(cfg.target_modules), as_tuple(cfg.exclude_modules)
    patterns = [pattern for pattern in wanted if pattern != ALL_LINEAR]
    kinds = {path: f"a {kind(module)}" for path, module in modules.items() if path}
    require_matches("target_modules", patterns, linear, kinds)
    require_matches("exclude_modules", unwanted, linear, kinds)

    left_out = _not_for_all_linear(model, linear) if ALL_LINEAR in wanted else {}
    found = []
    for path in linear:
        pattern = first_match(patterns, path)
        if pattern is None and ALL_LINEAR in wanted and path not in left_out:
            pattern = ALL_LINEAR
        if pattern is not None and first_match(unwanted, path) is None:
            found.append(Target(path, pattern, _layer(path)))
    for target in found:
        if not is_linear(linear[target.site]):
            raise TypeError(
                f"{target.site}: {_foreign(linear[target.site])}; accepted are torch.nn.Linear and "
                "transformers' Conv1D; leave it out with exclude_modules"
            )
        left_out.pop(target.site, None)
    if not found:
        raise ValueError(
            f"target_modules: {cfg.target_modules!r} less {cfg.exclude_modules!r} leaves none of "
            f"the model's {len(linear)} linear layers; left out: {left_out}"
        )
    return _of_roles(model, cfg, found), left_out


def _not_for_all_linear(model: nn.Module, linear: Mapping[str, nn.Module]) -> dict[str, str]:
    head = _output_head(model, linear)
    reasons = {}
    for path, module in linear.items():
        if path in head:
            reasons[path] = "output head"
        elif _is_router(model, path):
            reasons[path] = "MoE router"
        elif not is_linear(module):
            reasons[path] = _foreign(module)
    return reasons


def _foreign(module: nn.Module) -> str:
    return f"{kind(module)} has a forward or a weight storage of its own"


def _output_head(model: nn.Module, linear: Mapping[str, nn.Module]) -> set[str]:
    """A Hugging Face model's output embedding, else what is outside its base; others tell none."""
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    output = get_output_embeddings() if get_output_embeddings else None
    if output is not None:
        return {path for path, module in linear.items() if module is output}
    base = getattr(model, "base_model_prefix", "")
    if not base or not isinstance(getattr(model, base, None), nn.Module):
        return set()
    return {path for path in linear if not path.startswith(base + ".")}


def _is_router(model: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    gate = re.search(r"(^|_)(router|gate)$", name) is not None
    beside_experts = hasattr(model.get_submodule(parent), "experts")
    return "router" in parent or (gate and beside_experts)


def _of_roles(model: nn.Module, cfg: LinearConfig, found: Sequence[Target]) -> Sequence[Target]:
    wanted = set(as_tuple(cfg.target_roles))
    if not wanted:
        return found
    roles = {target.site: role_of(model, target.site) for target in found}
    if missing := wanted - {*roles.values()}:
        raise ValueError(f"target_roles: no {sorted(missing)} among {roles}")
    return [target for target in found if roles[target.site] in wanted]


def _trained_parameters(model: nn.Module, cfg: ParameterConfig) -> Sequence[Target]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    patterns = as_tuple(cfg.target_parameters)
    require_matches("target_parameters", patterns, parameters, {})
    found: dict[str, Target] = {}
    for name, parameter in parameters.items():
        pattern = first_match(patterns, name)
        if pattern is None:
            continue
        tied = [other for other, p in parameters.items() if p is parameter and other != name]
        if tied:
            raise ValueError(
                f"{name}: tied to {some(tied)}, and training one of them would untie them; give "
                "each module a parameter of its own first"
            )
        if not parameter.is_floating_point():
            raise TypeError(f"{name}: {parameter.dtype} cannot be trained; accepted are floats")
        site, _, leaf = name.rpartition(".")
        target = found.get(site) or Target(site, pattern, _layer(site))
        found[site] = target._replace(parameters=(*target.parameters, leaf))
    return [*found.values()]


def _of_layers(model: nn.Module, cfg: AdapterConfig, found: Sequence[Target]) -> Sequence[Target]:
    if cfg.layers is None:
        return found
    chosen: dict[str, Target] = {}
    for layer in as_tuple(cfg.layers):
        of_layer = [
            t for t in found if t.layer is not None and t.layer == _from_start(model, t, layer)
        ]
        if not of_layer:
            there = sorted({target.layer for target in found if target.layer is not None})
            raise ValueError(f"layers: no site in layer {layer}; there are sites in layers {there}")
        chosen |= {target.site: target for target in of_layer}
    return [target for target in found if target.site in chosen]


def _layer(path: str) -> int | None:
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _from_start(model: nn.Module, target: Target, layer: int) -> int:
    """A layer index counted from the first layer of the target's stack."""
    if layer >= 0:
        return layer
    stack = re.split(r"(?:^|\.)\d+(?:\.|$)", target.site, maxsplit=1)[0]
    return layer + len([*model.get_submodule(stack).children()])
