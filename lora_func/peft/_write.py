"""Writing PEFT's checkpoints."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_func.adapter._keys import Key, group
from lora_func.adapter._schema import refuse_other_leaves, weight_at
from lora_func.files._container import replace_file
from lora_func.modules import place_of, uncompiled
from lora_func.peft._formats import CONFIG, PREFIX, WEIGHTS, Format, format_of
from lora_func.runtime._frozen import frozen_parameters, shared_parameters
from lora_func.variants import by_name
from lora_func.weights._layers import is_linear


class _Site(NamedTuple):
    path: str
    variant: str
    format: Format
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

    LoRA, rsLoRA, DoRA, DeLoRA, IA3 on both sides, HRA, VeRA, OFT, ROAD and SHiRA are what PEFT has;
    EVA is written as the LoRA that it is, PiSSA as one of twice the rank; ``Full`` goes beside one
    of them, as PEFT's ``modules_to_save``.

    Args:
        params: The adapter; all of one kind.
        folder: Where; made if it is not there.
        model: The model it belongs to.
        base_model_name: What PEFT is to call the base.
        target: "vllm" refuses beforehand what vLLM does not serve.

    Raises:
        KeyError: If a key names nothing in the model.
        TypeError: If PEFT has no such variant, or not for such a layer.
        ValueError: If it is a stack, kinds are mixed, a setting differs from site to site that PEFT
            has one of, or vLLM would not serve it.
        OSError: If a file cannot be written.
    """
    model = uncompiled(model)
    if refuse_other_leaves(params, model):
        raise ValueError("params: is a stack; write its adapters one by one, from unstack")
    leaves = {key: leaf.detach().cpu() for key, leaf in params.items()}
    sites, saved = _sites(model, leaves)
    config = _config(model, sites, saved) | {"base_model_name_or_path": base_model_name}
    if target == "vllm":
        _refuse_unserved(config)
    tensors = {
        f"{PREFIX}{site.path}.{leaf.name}": leaf.theirs(site.leaves[name]).contiguous()
        for site in sites
        for name, leaf in site.format.leaves.items()
    }
    if config["peft_type"] == "VERA":
        shared = {name: leaves[str(Key("*", "vera", name))] for name in ("_A", "_B")}
        tensors |= {f"base_model.vera{name}": tensor.clone() for name, tensor in shared.items()}
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in saved.items()}

    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # without a config nobody takes half a checkpoint for a whole one
    (folder / CONFIG).unlink(missing_ok=True)
    replace_file(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    replace_file(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())


def _sites(model: nn.Module, leaves: Mapping[str, Tensor]) -> tuple[list[_Site], dict[str, Tensor]]:
    """The sites in PEFT's terms, and the parameters of the modules that it is to keep whole."""
    sites: list[_Site] = []
    saved: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    for (path, name), keys in group(leaves).items():
        module, parameter = place_of(model, path)
        own = {leaf: leaves[key] for leaf, key in keys.items()}
        if not path:
            raise TypeError(f"{type(model).__name__}: PEFT wraps parts of a model, not all of it")
        if by_name(name).parameters is not None:
            whole, changed = _whole(model, path, own)
            saved, trained = saved | whole, trained | changed
            continue
        name, own = _as_lora(own) if name == "pissa" else (name, own)
        embedded = isinstance(module, nn.Embedding)
        found = format_of(name, "_neumann" not in own, embedded)
        if found is None or "_A0" in own or parameter is not None:
            raise TypeError(
                f"{path}: PEFT has no {name} of this kind for a {type(module).__name__}; "
                "lora_func.to_lora makes a LoRA of any change of weights"
            )
        linear = is_linear(module) and (isinstance(module, nn.Linear) or found.conv1d)
        if not linear and not embedded:
            raise TypeError(f"{path}: PEFT has no {name} for a {type(module).__name__}")
        d_out, d_in = weight_at(model, path).shape
        sites.append(_Site(path, name, found, own, found.settings(own, (d_out, d_in))))
    return sites, saved | trained


def _as_lora(own: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """PiSSA's ``s (B A - B0 A0)`` as a product of twice the rank."""
    A, B = torch.cat([own["A"], own["_A0"]]), torch.cat([own["B"], -own["_B0"]], 1)
    return "lora", {"A": A, "B": B, "_scale": own["_scale"]}


def _whole(
    model: nn.Module, path: str, own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All parameters of modules of which some are trained, and those; tied ones at each place."""
    places, here = shared_parameters(model), frozen_parameters(model.get_submodule(path))
    names = {id(module): name for name, module in model.named_modules()}
    whole: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    for leaf, tensor in own.items():
        for module, alias in places[id(here[leaf])]:
            name = names[id(module)]
            if any(module.children()):
                raise TypeError(f"{name}: PEFT keeps whole modules; this one has others inside")
            for of_it, p in frozen_parameters(module).items():
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
            f"params: holds {[*kinds.values()]}; a checkpoint of PEFT is of one kind, beside which "
            "trained parameters may stand"
        )
    ((peft_type, _),) = kinds.items()
    paths = [site.path for site in sites]
    config: dict[str, Any] = {
        "peft_type": peft_type,
        "inference_mode": True,
        "target_modules": _targets(model, paths),
    }
    config |= _settings(sites)
    if peft_type == "IA3":
        inputs = [site.path for site in sites if site.variant == "ia3_ff"]
        config["feedforward_modules"] = "|".join(map(re.escape, inputs)) if inputs else []
    if peft_type == "SHIRA" and any(
        len(site.leaves["values"]) != config["r"] * sum(weight_at(model, site.path).shape)
        for site in sites
    ):
        raise ValueError(f"{paths[0]}: PEFT has r (d_out + d_in) values at each site, with one r")
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
    """What holds for most sites, and the exceptions where PEFT knows of exceptions."""
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
    """Paths in full; where another module's ends with one of them, a regular expression."""
    names = [name for name, _ in model.named_modules() if name not in {*paths}]
    if any(name.endswith(f".{path}") for name in names for path in paths):
        return "|".join(map(re.escape, paths))
    return list(paths)


def _refuse_unserved(config: Mapping[str, Any]) -> None:
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
