"""Which sites of a model a config names."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lora_func.checks import as_tuple
from lora_func.compat import parameters_of
from lora_func.configs import ALL_LINEAR, AdapterConfig, LinearConfig, ParameterConfig
from lora_func.modules import check_not_flattened, find_site, inner_model, named_parameters
from lora_func.targeting._layers import Layers
from lora_func.targeting._parameters import check_trainable, distinct_parameters
from lora_func.targeting._patterns import check_matches, first_match, kind
from lora_func.targeting._roles import roles_of
from lora_func.variants import by_config
from lora_func.weights import has_matrix, is_linear, matrix

_log = logging.getLogger("lora_func")


class Target(NamedTuple):
    """One site that a config names.

    Attributes:
        site: Path of the module or of the parameter.
        pattern: The first pattern that matched.
        layer: Index of its layer; None outside any stack of layers.
        parameters: Names of the module's own parameters, if these are trained themselves.
    """

    site: str
    pattern: str
    layer: int | None
    parameters: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The strings that patterns are searched in: the path, or the full names of parameters."""
        prefix = f"{self.site}." if self.site else ""
        return tuple(prefix + parameter for parameter in self.parameters) or (self.site,)


@dataclass(frozen=True)
class Targets:
    """The sites that a config names in a model, in the model's order; iterable and sized.

    Attributes:
        sites: The sites.
        left_out: The linear layers that "all-linear" left out: path -> reason.
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
        The sites, each with its pattern and layer index, and the layers that "all-linear" left out;
        these are logged as well.

    Raises:
        TypeError: If cfg is no config of a registered variant, or a pattern names a module that
            cannot be adapted, or that has no role if roles are asked for.
        ValueError: If a pattern, a layer index or a role matches nothing, no site is left, a
            parameter to train lies in the memory of another, or FSDP1 has flattened the weights.

    Examples:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        >>> [target.site for target in lf.find_targets(model, lf.LoRA(layers=(0, -1)))]
        ['0', '2']
    """
    by_config(cfg)
    model = inner_model(model)
    check_not_flattened(model)
    left_out: dict[str, str] = {}
    if isinstance(cfg, ParameterConfig):
        names = [name for name, _ in named_parameters(model)]
        sites = _trained_parameters(model, cfg)
    elif isinstance(cfg, LinearConfig):
        names = [name for name, _ in (*model.named_modules(), *named_parameters(model))]
        sites, left_out = _matrices(model, cfg)
    else:
        raise TypeError(
            f"{type(cfg).__name__} names no sites; derive it from LinearConfig or ParameterConfig"
        )
    kept = [name for target in sites for name in target.names]
    others = dict.fromkeys(names, "left out by exclude_modules, target_roles or layers")
    for field, patterns in cfg.site_patterns().items():
        check_matches(field, patterns, kept, others)
    if left_out:
        _log.info('"all-linear" left out %s', left_out)
    return Targets(tuple(sites), left_out)


def _matrices(model: nn.Module, cfg: LinearConfig) -> tuple[Sequence[Target], dict[str, str]]:
    modules = dict(model.named_modules())
    linear = {path: m for path, m in modules.items() if isinstance(m, nn.Linear) or is_linear(m)}
    adaptable = {path: m for path, m in modules.items() if path in linear or has_matrix(m)}
    parameters = distinct_parameters(model, as_tuple(cfg.target_parameters))
    wanted, unwanted = as_tuple(cfg.target_modules), as_tuple(cfg.exclude_modules)
    patterns = [pattern for pattern in wanted if pattern != ALL_LINEAR]
    kinds = {path: f"a {kind(module)}" for path, module in modules.items() if path}
    check_matches("target_modules", patterns, adaptable, kinds)
    check_matches("exclude_modules", unwanted, [*adaptable, *parameters], kinds)

    left_out = _not_for_all_linear(modules, linear) if ALL_LINEAR in wanted else {}
    matched = {}
    for path in adaptable:
        matched[path] = first_match(patterns, path)
        is_meant = path in linear and path not in left_out
        if matched[path] is None and ALL_LINEAR in wanted and is_meant:
            matched[path] = ALL_LINEAR
    matched |= parameters
    layers = Layers(model)
    sites = [
        Target(path, pattern, layers.layer_of(path))
        for path, pattern in matched.items()
        if pattern is not None and first_match(unwanted, path) is None
    ]
    if not sites:
        raise ValueError(
            f"target_modules: {cfg.target_modules!r} less {cfg.exclude_modules!r} leaves none of "
            f"the model's {len(linear)} linear layers; left out: {left_out}"
        )
    found = _of_layers(layers, cfg, sites)
    for target in found:
        _check_adaptable(model, target)
        left_out.pop(target.site, None)
    return _of_roles(model, cfg, found), left_out


def _check_adaptable(model: nn.Module, target: Target) -> None:
    module, name = find_site(model, target.site)
    if name is None and not has_matrix(module):
        raise TypeError(
            f"{target.site}: {_foreign(module)}; accepted are torch.nn.Linear, transformers' "
            "Conv1D, bitsandbytes' Linear4bit and Linear8bitLt, convolutions and embeddings; leave "
            "it out with exclude_modules, or name its weight with target_parameters"
        )
    if name is not None:
        try:
            W = matrix(module, parameters_of(module), name)
        except TypeError as error:
            raise TypeError(
                f"{target.site}: {error}; accepted are parameters of two or three axes"
            ) from None
        if not W.dtype.is_floating_point:
            raise TypeError(f"{target.site}: {W.dtype} cannot be adapted; accepted are floats")


def _not_for_all_linear(
    modules: Mapping[str, nn.Module], linear: Mapping[str, nn.Module]
) -> dict[str, str]:
    head = {path for root in modules for path in _output_head(root, modules[root], linear)}
    reasons = {}
    for path, module in linear.items():
        if path in head:
            reasons[path] = "output head"
        elif _is_router(path, modules):
            reasons[path] = "MoE router"
        elif never_calls(modules[path.rpartition(".")[0]], path.rpartition(".")[2]):
            reasons[path] = "its parent reads its weight and never calls it"
        elif not is_linear(module):
            reasons[path] = _foreign(module)
    return reasons


def _foreign(module: nn.Module) -> str:
    return f"{kind(module)} has its own forward or its own weight storage"


def _output_head(root: str, module: nn.Module, linear: Mapping[str, nn.Module]) -> set[str]:
    """A Hugging Face model's output embedding, or else its layers outside the base model."""
    get_output_embeddings = getattr(module, "get_output_embeddings", None)
    output = get_output_embeddings() if callable(get_output_embeddings) else None
    if output is not None:
        return {path for path, layer in linear.items() if layer is output}
    base = getattr(module, "base_model_prefix", "")
    if not base or not isinstance(getattr(module, base, None), nn.Module):
        return set()
    inside = f"{root}." if root else ""
    return {p for p in linear if p.startswith(inside) and not p.startswith(f"{inside}{base}.")}


def _is_router(path: str, modules: Mapping[str, nn.Module]) -> bool:
    parent, _, name = path.rpartition(".")
    gate = re.search(r"(^|_)(router|gate)$", name) is not None
    return "router" in parent or (gate and hasattr(modules[parent], "experts"))


def _of_roles(model: nn.Module, cfg: LinearConfig, found: Sequence[Target]) -> Sequence[Target]:
    wanted = set(as_tuple(cfg.target_roles))
    if not wanted:
        return found
    for target in found:
        module, name = find_site(model, target.site)
        if name is not None or not is_linear(module):
            raise TypeError(f"{target.site}: a {kind(module)} has no role; only linear layers have")
    roles = roles_of(model, [target.site for target in found])
    if missing := wanted - {*roles.values()}:
        raise ValueError(f"target_roles: no {sorted(missing)} among {roles}")
    return [target for target in found if roles[target.site] in wanted]


def _trained_parameters(model: nn.Module, cfg: ParameterConfig) -> Sequence[Target]:
    parameters = dict(named_parameters(model))
    layers = Layers(model)
    found: dict[str, Target] = {}
    for name, pattern in distinct_parameters(model, as_tuple(cfg.target_parameters)).items():
        site, _, leaf = name.rpartition(".")
        target = found.get(site) or Target(site, pattern, layers.layer_of(site))
        found[site] = target._replace(parameters=(*target.parameters, leaf))
    sites = _of_layers(layers, cfg, [*found.values()])
    check_trainable((name for target in sites for name in target.names), parameters)
    return sites


def _of_layers(layers: Layers, cfg: AdapterConfig, found: Sequence[Target]) -> Sequence[Target]:
    if cfg.layers is None:
        return found
    chosen = layers.select(as_tuple(cfg.layers), [target.site for target in found])
    return [target for target in found if target.site in chosen]


def never_calls(parent: nn.Module, name: str) -> bool:
    """True if a parent only reads a child's weight, as Mamba-1's mixers do with ``dt_proj``."""
    return name == "dt_proj" and hasattr(parent, "A_log") and hasattr(parent, "conv1d")
