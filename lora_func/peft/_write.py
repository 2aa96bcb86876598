"""Writing PEFT's checkpoints."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from lora_func.adapter import SHARED, Key, group
from lora_func.checks import check_choice
from lora_func.files import replace_file
from lora_func.modules import find_site, inner_model, original_parameters, shared_parameters
from lora_func.peft._formats import CONFIG, PREFIX, WEIGHTS, readable_formats, writable_format
from lora_func.runtime import check_single
from lora_func.variant import PeftFormat
from lora_func.variants import by_name
from lora_func.weights import is_linear, weight_at


class _Site(NamedTuple):
    path: str
    variant: str
    format: PeftFormat
    leaves: dict[str, Tensor]
    settings: dict[str, Any]


def to_peft(
    params: Mapping[str, Tensor],
    folder: str | PathLike[str],
    *,
    model: nn.Module,
    base_model_name: str | None = None,
    target: Literal["peft", "vllm"] = "peft",
) -> None:
    """Write an adapter as a checkpoint that ``peft.PeftModel.from_pretrained`` loads.

    A variant is written in its field ``peft``: in PEFT's own format, or as a LoRA that makes the
    same change. Parameters that are trained themselves (``Full``) become PEFT's
    ``modules_to_save``, beside an adapter of another variant.

    Args:
        params: The adapter; all sites of one kind of PEFT.
        folder: The folder to write to; it is made if it does not exist.
        model: The model it belongs to.
        base_model_name: The name of the base in PEFT's config.
        target: "vllm" also refuses what vLLM does not serve.

    Raises:
        KeyError: If a key names nothing in the model.
        TypeError: If the variant has no format of PEFT, or none for such a layer.
        ValueError: If params is a stack, kinds are mixed, PEFT has a single value for a setting
            that differs from site to site, or vLLM would not serve the adapter.
        OSError: If a file cannot be written.
    """
    check_choice("target", target, ("peft", "vllm"))
    model = inner_model(model)
    check_single(params, model)
    leaves = {key: leaf.detach().cpu() for key, leaf in params.items()}
    sites, saved = _sites(model, leaves)
    config = _config(model, sites, saved) | {"base_model_name_or_path": base_model_name}
    if target == "vllm":
        _check_served(config)
    tensors = {
        f"{PREFIX}{site.path}.{leaf.name}": leaf.write(site.leaves[name]).contiguous()
        for site in sites
        for name, leaf in site.format.leaves.items()
    }
    tensors |= {
        name: leaves[str(Key(SHARED, site.variant, leaf))].clone()
        for site in sites
        for leaf, name in site.format.shared.items()
    }
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in saved.items()}

    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # without a config, half a checkpoint does not pass for a whole one
    (folder / CONFIG).unlink(missing_ok=True)
    replace_file(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    replace_file(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())


def _sites(model: nn.Module, leaves: Mapping[str, Tensor]) -> tuple[list[_Site], dict[str, Tensor]]:
    """The sites in PEFT's terms, and the parameters of the modules that it keeps whole."""
    sites: list[_Site] = []
    saved: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    for (path, name), keys in group(leaves).items():
        module, parameter = find_site(model, path)
        own = {leaf: leaves[key] for leaf, key in keys.items()}
        if not path:
            raise TypeError(f"{type(model).__name__}: PEFT wraps parts of a model, not all of it")
        variant = by_name(name)
        if variant.parameters is not None:
            whole, changed = _whole(model, path, own)
            saved, trained = saved | whole, trained | changed
            continue
        embedding = isinstance(module, nn.Embedding)
        found = writable_format(variant, own, embedding)
        if found is None or parameter is not None:
            raise TypeError(
                f"{path}: there is no format of PEFT for this {name} on a {type(module).__name__}; "
                "lora_func.to_lora makes a LoRA of any change of weights"
            )
        linear = is_linear(module) and (isinstance(module, nn.Linear) or found.conv1d)
        if not linear and not embedding:
            raise TypeError(
                f"{path}: there is no format of PEFT for {name} on a {type(module).__name__}"
            )
        own = own if found.convert is None else found.convert(own)
        d_out, d_in = weight_at(model, path).shape
        try:
            settings = found.settings(own, (d_out, d_in))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        sites.append(_Site(path, name, found, own, settings))
    return sites, saved | trained


def _whole(
    model: nn.Module, path: str, own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All parameters of modules with trained ones, and the trained ones, at each tied place."""
    places, here = shared_parameters(model), model.get_submodule(path)
    names = {id(module): name for name, module in model.named_modules()}
    whole: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    for leaf, tensor in own.items():
        for module, alias in places[here, leaf]:
            name = names[id(module)]
            if any(module.children()):
                raise TypeError(f"{name}: PEFT keeps whole modules; this one has others inside")
            for of_it, p in original_parameters(module).items():
                if p is not None:
                    whole[f"{name}.{of_it}"] = p.detach().cpu().clone()
            trained[f"{name}.{alias}"] = tensor.clone()
    return whole, trained


def _config(
    model: nn.Module, sites: Sequence[_Site], saved: Mapping[str, Tensor]
) -> dict[str, Any]:
    kinds = {site.format.peft_type: site.variant for site in sites}
    if len(kinds) != 1:
        raise ValueError(
            f"params: holds {[*kinds.values()]}; a checkpoint of PEFT has one kind of adapter, and "
            "possibly trained parameters"
        )
    ((peft_type, _),) = kinds.items()
    paths = [site.path for site in sites]
    config: dict[str, Any] = {
        "peft_type": peft_type,
        "inference_mode": True,
        "target_modules": _targets(model, paths),
    }
    config |= _settings(sites)
    for setting in {f.listed for _, f in readable_formats(peft_type) if f.listed}:
        listed = [site.path for site in sites if site.format.listed == setting]
        config[setting] = "|".join(map(re.escape, listed)) if listed else []
    if sites[0].format.conv1d:
        config["fan_in_fan_out"] = not any(
            isinstance(model.get_submodule(path), nn.Linear) for path in paths
        )
    if saved:
        whole = {name.rpartition(".")[0] for name in saved}
        for name, _ in model.named_modules():
            if name not in whole and any(name.endswith(path) for path in whole):
                raise ValueError(
                    f"{name}: PEFT would keep this module too, since its path ends like one of "
                    f"{sorted(whole)}"
                )
        config["modules_to_save"] = sorted(whole)
    return config


def _settings(sites: Sequence[_Site]) -> dict[str, Any]:
    """The settings of most sites, and the exceptions that PEFT can hold."""
    config: dict[str, Any] = {}
    patterns = sites[0].format.patterns
    for name in dict.fromkeys(name for site in sites for name in site.settings):
        values = {site.path: site.settings.get(name) for site in sites}
        ((common, _),) = Counter(values.values()).most_common(1)
        others = {path: value for path, value in values.items() if value != common}
        if others and name not in patterns:
            path, value = next(iter(others.items()))
            raise ValueError(
                f"{path}: {name} is {value!r}, elsewhere {common!r}; PEFT has one for all sites"
            )
        config[name] = common
        if others:
            config[patterns[name]] = {f"^{re.escape(p)}": value for p, value in others.items()}
    return config


def _targets(model: nn.Module, paths: Sequence[str]) -> list[str] | str:
    """Full paths; a regular expression if the path of another module ends with one of them."""
    names = [name for name, _ in model.named_modules() if name not in {*paths}]
    if any(name.endswith(f".{path}") for name in names for path in paths):
        return "|".join(map(re.escape, paths))
    return list(paths)


def _check_served(config: Mapping[str, Any]) -> None:
    wrong = {
        f"adapters of kind {config['peft_type']}": config["peft_type"] != "LORA",
        "DoRA": config.get("use_dora", False),
        "modules_to_save": bool(config.get("modules_to_save")),
        "scales that differ from site to site": bool(config.get("alpha_pattern"))
        or bool(config.get("rank_pattern")),
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(
            f"target='vllm': vLLM does not serve {', '.join(found)}; merge(model, params), or "
            "to_lora(params, model, rank)"
        )
