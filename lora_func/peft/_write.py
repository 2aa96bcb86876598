"""Writing PEFT's checkpoints."""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lora_func.adapter import SHARED, Key
from lora_func.checks import check_choice
from lora_func.files import replace_file
from lora_func.modules import find_site, inner_model
from lora_func.peft._formats import CONFIG, PREFIX, WEIGHTS, readable_formats
from lora_func.peft._numbered import with_numbers
from lora_func.peft._sites import PeftSite, peft_sites
from lora_func.peft._task import TASKS, hidden_by_head, task_of
from lora_func.peft._tokens import SETTING, settings_of, take_tokens, tensors_of
from lora_func.peft._trained import Trained, check_ambiguous, trained_parameters
from lora_func.runtime import check_single


def to_peft(
    params: Mapping[str, Tensor],
    folder: str | PathLike[str],
    *,
    model: nn.Module,
    base_model_name: str | None = None,
    task_type: str | None = None,
    target: Literal["peft", "vllm"] = "peft",
) -> None:
    """Write an adapter as a checkpoint that ``peft.PeftModel.from_pretrained`` loads.

    A variant is written in its field ``peft``: in PEFT's own format, or as a LoRA that makes the
    same change. Parameters that are trained themselves (``Full``) become PEFT's
    ``modules_to_save`` or ``bias`` beside an adapter of another variant, and PEFT's LN_TUNING
    alone.

    Args:
        params: The adapter; all sites of one kind of PEFT.
        folder: The folder to write to; it is made if it does not exist.
        model: The model it belongs to.
        base_model_name: The name of the base in PEFT's config. With it,
            ``peft.AutoPeftModelFor...`` loads the checkpoint.
        task_type: PEFT's name of the task, such as "CAUSAL_LM"; None infers it from the class of a
            transformers model.
        target: "vllm" also refuses what vLLM does not serve.

    Raises:
        KeyError: If a key names nothing in the model.
        TypeError: If PEFT has no format for a variant on such a layer.
        ValueError: If params is a stack, kinds are mixed, PEFT has a single value for a setting
            that differs from site to site, PEFT would ignore a site for the task, or vLLM would not
            serve the adapter.
        BusyModelError: If the model has an adapter attached.
        OSError: If a file cannot be written.
    """
    check_choice("target", target, ("peft", "vllm"))
    check_choice("task_type", task_type, TASKS)
    model = inner_model(model)
    check_single(params, model)
    leaves = {key: leaf.detach().cpu() for key, leaf in params.items()}
    leaves, tokens = take_tokens(model, leaves)
    sites, whole = peft_sites(model, leaves)
    stems = {site.module: site.stem for site in sites}
    task = _task(model, task_type, [*stems])
    if whole and not sites and all(hidden_by_head(task, [path]) for path in whole):
        task = None  # a head alone is what LN_TUNING names
    trained = trained_parameters(model, whole, stems, _kind(sites), task)
    config = _config(model, sites, trained) if leaves or not tokens else {}
    config |= settings_of(tokens, config) | {
        "base_model_name_or_path": base_model_name,
        "task_type": task,
    }
    if task is None:
        kind = type(model)
        parent = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        config["auto_mapping"] = parent
    if target == "vllm":
        _check_served(config)
    more = trained.tensors | tensors_of(tokens, config)
    tensors = _tensors(model, sites, leaves) | {f"{PREFIX}{name}": t for name, t in more.items()}
    _write(Path(folder), tensors, _nested(config))


def _tensors(
    model: nn.Module, sites: Sequence[PeftSite], leaves: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of an adapter, and those that its sites share, by their full names."""
    own = {f"{PREFIX}{name}": t for site in sites for name, t in site.tensors().items()}
    shared = {
        name: leaves[str(Key(SHARED, site.variant, leaf))].clone()
        for site in sites
        for leaf, name in site.format.shared.items()
    }
    return with_numbers(model, own, [site.format for site in sites]) | shared


def _write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    # without a config, half a checkpoint does not pass for a whole one
    (folder / CONFIG).unlink(missing_ok=True)
    replace_file(folder / WEIGHTS, save({**tensors}, {"format": "pt"}))
    replace_file(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())


def _kind(sites: Sequence[PeftSite]) -> str | None:
    """The kind of adapter; None if there is none beside the trained parameters."""
    kinds = {site.format.peft_type: site.variant for site in sites}
    if len(kinds) > 1:
        raise ValueError(
            f"params: holds {[*kinds.values()]}; a checkpoint of PEFT has one kind of adapter, and "
            "possibly trained parameters"
        )
    return next(iter(kinds), None)


def _task(model: nn.Module, given: str | None, paths: Sequence[str]) -> str | None:
    task = given or task_of(model)
    if path := hidden_by_head(task, paths):
        if given is None:
            return None
        raise ValueError(
            f"{path}: PEFT keeps this module whole for {task!r}, and ignores an adapter there; "
            "leave task_type out"
        )
    return task


def _config(model: nn.Module, sites: Sequence[PeftSite], trained: Trained) -> dict[str, Any]:
    kind, config = _kind(sites), dict[str, Any]()
    if kind is None:
        modules = _targets(model, trained.targets)
        config = {"peft_type": trained.kind, "inference_mode": True, "target_modules": modules}
        return config | ({"modules_to_save": trained.modules} if trained.modules else {})
    of_parameters = [site.path for site in sites if "Parameter" in site.format.layers]
    paths = [*dict.fromkeys(site.path for site in sites if site.path not in of_parameters)]
    config = {
        "peft_type": kind,
        "inference_mode": True,
        "target_modules": _targets(model, paths) if paths else None,
    }
    if of_parameters:
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        check_ambiguous(of_parameters, names)
        config["target_parameters"] = of_parameters
    config |= _settings(sites)
    config |= _lists(kind, sites)
    if any("Conv1D" in site.format.layers for site in sites):
        config["fan_in_fan_out"] = not any(
            isinstance(find_site(model, path)[0], nn.Linear) for path in paths
        )
    if any(path.rpartition(".")[2] == "embed_tokens" for path in paths):  # PEFT ties by this name
        config["ensure_weight_tying"] = _is_mirrored(sites)
    if trained.modules:
        config["modules_to_save"] = sorted(trained.modules)
    if trained.bias:
        config["bias"] = trained.bias
    return config


def _lists(kind: str, sites: Sequence[PeftSite]) -> dict[str, Any]:
    """The settings by which PEFT tells the formats of its sites apart."""
    formats = [f for _, f in readable_formats(kind) if f.listed]
    found = {
        str(f.listed): f.lists([site.path for site in sites if site.format.listed == f.listed])
        for f in formats
    }
    for site in sites:
        for f in formats:
            if f.means(found, site.path) != (site.format.listed == f.listed):
                raise ValueError(
                    f"{site.path}: PEFT would find it by {f.listed} = {found[str(f.listed)]!r}, "
                    "which is meant for other sites; rename the module, or leave the site out"
                )
    return {name: value for name, value in found.items() if value is not None}


def _nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the settings of sub-configs in dicts of their own."""
    nested: dict[str, Any] = {}
    for name, value in config.items():
        outer, _, inner = name.rpartition(".")
        (nested.setdefault(outer, {}) if outer else nested)[inner] = value
    return nested


def _is_mirrored(sites: Sequence[PeftSite]) -> bool:
    """True if an embedding and its head hold the same leaves, one of them transposed."""
    memory = [{leaf.data_ptr() for leaf in site.leaves.values() if leaf.ndim} for site in sites]
    embedding = [i for i, site in enumerate(sites) if "Embedding" in site.format.layers]
    return any(memory[i] == own for i in embedding for j, own in enumerate(memory) if j != i)


def _settings(sites: Sequence[PeftSite]) -> dict[str, Any]:
    """The settings of most sites, and the exceptions that PEFT can hold."""
    config: dict[str, Any] = {}
    patterns = sites[0].format.patterns
    for name in dict.fromkeys(name for site in sites for name in site.settings):
        has_own = [site for site in sites if name in site.settings or "." not in name]
        values = {site.path: site.settings.get(name) for site in has_own}
        choices = [value for value in values.values() if isinstance(value, frozenset)]
        if choices and (fitting := frozenset.intersection(*choices)):
            config[name] = min(fitting)
            continue
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


def _targets(model: nn.Module, paths: Collection[str]) -> list[str] | str:
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
        "trained biases": bool(config.get("bias")),
        "trained tokens": bool(config.get(SETTING)),
        "target_parameters": bool(config.get("target_parameters")),
        "scales that differ from site to site": bool(config.get("alpha_pattern"))
        or bool(config.get("rank_pattern")),
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(
            f"target='vllm': vLLM does not serve {', '.join(found)}; merge(model, params), or "
            "to_lora(params, model, rank)"
        )
