"""The sites of an adapter in PEFT's terms."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_func.adapter import group, pad_axes
from lora_func.modules import find_site, original_parameters, shared_parameters
from lora_func.peft._checkpoint import BASE
from lora_func.peft._formats import layer_of, sizes_of, writable_format
from lora_func.peft._tied import mirrored
from lora_func.variant import PeftFormat, Variant, rank_of
from lora_func.variants import by_name
from lora_func.weights import weight_at


class PeftSite(NamedTuple):
    """One site of an adapter, as PEFT stores it.

    Attributes:
        path: The path that PEFT's config names: of the module, or of the parameter.
        stem: What stands before the names of its tensors.
        variant: The variant's name.
        format: The format.
        leaves: The leaves.
        settings: Its part of the config.
        sizes: As ``sizes_of`` gives them.
    """

    path: str
    stem: str
    variant: str
    format: PeftFormat
    leaves: dict[str, Tensor]
    settings: dict[str, Any]
    sizes: tuple[int, ...]

    @property
    def module(self) -> str:
        """The path of the module in the model; the parameter's own path for a parameter."""
        return f"{self.path}.out_proj" if "out_proj" in self.format.layers else self.path

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names."""
        return {
            f"{self.stem}.{leaf.name}": leaf.to_peft(self.leaves[name], self.sizes)
            for name, leaf in self.format.leaves.items()
        }


def peft_sites(
    model: nn.Module, leaves: Mapping[str, Tensor]
) -> tuple[list[PeftSite], dict[str, dict[str, Tensor]]]:
    """Return the sites of an adapter, and the parameters that it trains themselves.

    Args:
        model: The model.
        leaves: The adapter, detached, on the CPU.

    Returns:
        The sites; path of a module -> its trained parameters by name.

    Raises:
        TypeError: If a variant has no format of PEFT for such a layer.
        ValueError: If PEFT cannot hold the leaves of a site.
    """
    sites: list[PeftSite] = []
    trained: dict[str, dict[str, Tensor]] = {}
    for (path, name), keys in group(leaves).items():
        own, variant = {leaf: leaves[key] for leaf, key in keys.items()}, by_name(name)
        if not path:
            raise TypeError(f"{type(model).__name__}: PEFT wraps parts of a model, not all of it")
        if variant.parameters is not None:
            trained[path] = own
        else:
            sites += _of_one(model, path, variant, own)
    sites = _with_one_rank(model, sites)
    return _with_stems(model, _with_both_projections(model, sites)), trained


def _of_one(
    model: nn.Module, path: str, variant: Variant, leaves: Mapping[str, Tensor]
) -> list[PeftSite]:
    module, parameter = find_site(model, path)
    if isinstance(module, nn.Embedding) and parameter == "weight":
        return _at_tied(model, path.removesuffix(".weight"), variant, leaves)
    site = _site(model, path, variant, leaves)
    if {*site.format.layers} & {"in_proj", "out_proj"}:
        site = site._replace(path=path.rpartition(".")[0])
    return [site]


def _site(model: nn.Module, path: str, variant: Variant, leaves: Mapping[str, Tensor]) -> PeftSite:
    layer, (module, _) = layer_of(model, path), find_site(model, path)
    found = writable_format(variant, leaves, layer)
    why = "PEFT would not read it as this change" if found is None else found.refuses(module)
    if found is None or why is not None:
        raise TypeError(
            f"{path}: {variant.name} on a {layer} layer is not written: {why}; lora_func.to_lora "
            "makes a LoRA of any change of weights"
        )
    own = dict(leaves) if found.convert is None else found.convert(leaves)
    site = PeftSite(path, path, variant.name, found, own, {}, sizes_of(model, path))
    return _with_settings(model, site)


def _with_settings(model: nn.Module, site: PeftSite) -> PeftSite:
    """Add the part of the config that the leaves of a site tell."""
    d_out, d_in = weight_at(model, site.path).weight.shape[-2:]
    try:
        settings = site.format.settings_at(site.leaves, (d_out, d_in), site.sizes)
    except ValueError as error:
        raise ValueError(f"{site.path}: {error}") from None
    return site._replace(settings=settings)


def _with_one_rank(model: nn.Module, sites: Sequence[PeftSite]) -> list[PeftSite]:
    """Pad the leaves of sites to the largest rank, where PEFT has one for all."""
    ranks = [rank_of(by_name(site.variant), site.leaves) for site in sites if site.format.one_rank]
    padded = []
    for site in sites:
        axes = by_name(site.variant).rank_axes
        if site.format.one_rank and rank_of(by_name(site.variant), site.leaves) < max(ranks):
            leaves = {
                leaf: pad_axes(tensor, axes.get(leaf, ()), max(ranks))
                for leaf, tensor in site.leaves.items()
            }
            site = _with_settings(model, site._replace(leaves=leaves))
        padded.append(site)
    return padded


def _at_tied(
    model: nn.Module, path: str, variant: Variant, leaves: Mapping[str, Tensor]
) -> list[PeftSite]:
    """An embedding's table, which is written at the head too if that is tied to it."""
    here = model.get_submodule(path)
    names = {module: name for name, module in model.named_modules()}
    sites = [_site(model, path, variant, leaves)]
    for module, _ in shared_parameters(model)[here, "weight"]:
        if module is not here:
            at_head = {**leaves, **mirrored(variant, leaves)}
            sites.append(_site(model, names[module], variant, at_head))
    return sites


def _with_both_projections(model: nn.Module, sites: Sequence[PeftSite]) -> list[PeftSite]:
    """Add zeros at the projections of torch's attention without an adapter: PEFT adapts both."""
    of_attention: dict[str, list[PeftSite]] = defaultdict(list)
    for site in sites:
        if {*site.format.layers} & {"in_proj", "out_proj"}:
            of_attention[site.path].append(site)
    added = []
    for path, here in of_attention.items():
        settings = [site.settings for site in here]
        if any(one != settings[0] for one in settings):
            raise ValueError(
                f"{path}: its projections have the settings {settings}; PEFT has one rank and "
                "alpha for both"
            )
        if len(here) == 1:
            (site,) = here
            name = "out_proj" if "in_proj" in site.format.layers else "in_proj_weight"
            d_out, d_in = weight_at(model, f"{path}.{name}").shape
            zeros = {"A": (settings[0]["r"], d_in), "B": (d_out, settings[0]["r"])}
            leaves = {leaf: site.leaves[leaf].new_zeros(shape) for leaf, shape in zeros.items()}
            other = next(
                f for f in by_name(site.variant).peft if name.removesuffix("_weight") in f.layers
            )
            added.append(site._replace(format=other, leaves=leaves))
    return [*sites, *added]


def _with_stems(model: nn.Module, sites: Sequence[PeftSite]) -> list[PeftSite]:
    """Put the names of wrappers into the stems; of several parameters the first is innermost."""
    of_module: dict[str, list[str]] = defaultdict(list)
    for site in sites:
        if "Parameter" in site.format.layers:
            module, _, name = site.path.rpartition(".")
            of_module[module].append(name)
    placed = []
    for site in sites:
        stem, (module, _, name) = site.path, site.path.rpartition(".")
        if "out_proj" in site.format.layers:
            stem = f"{stem}.{BASE}.out_proj"
        elif "Parameter" in site.format.layers:
            own = original_parameters(model.get_submodule(module))
            ordered = [one for one in own if one in of_module[module]]
            stem = module + f".{BASE}" * (len(ordered) - 1 - ordered.index(name))
        placed.append(site._replace(stem=stem))
    return placed
