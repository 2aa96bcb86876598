"""How PEFT names and lays out the leaves of each kind of adapter that it has."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lora_func.variants.dora import squared_norms
from lora_func.weights._layers import Affine

Shape: TypeAlias = tuple[int, int]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class Leaf(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
        name: What PEFT calls it, after the path of its module.
        theirs: From our layout to theirs.
        ours: And back, given the config.
    """

    name: str
    theirs: Callable[[Tensor], Tensor] = torch.Tensor.clone
    ours: Callable[[Tensor, Mapping[str, Any]], Tensor] = lambda tensor, config: tensor.clone()


class Format(NamedTuple):
    """A kind of adapter.

    Attributes:
        peft_type: What PEFT calls it.
        leaves: Our leaf -> theirs.
        settings: From a site's leaves and the shape of its weight, what the config says of it.
        constants: From the config, a site's leaves and its weight, the constants that no tensor of
            a checkpoint holds.
        patterns: The settings that may differ from site to site, and what the config calls the
            dict of exceptions.
        conv1d: Whether PEFT has it for transformers' Conv1D.
    """

    peft_type: str
    leaves: Mapping[str, Leaf]
    settings: Callable[[Mapping[str, Tensor], Shape], dict[str, Any]] = lambda leaves, shape: {}
    constants: Callable[[Mapping[str, Any], Mapping[str, Tensor], Affine], dict[str, Tensor]] = (
        lambda config, leaves, W: {}
    )
    patterns: Mapping[str, str] = {}
    conv1d: bool = False


def _lora(leaves: Mapping[str, Tensor], shape: Shape) -> dict[str, Any]:
    r = leaves["A"].shape[-2]
    return {"r": r, "lora_alpha": _alpha(leaves["_scale"].item(), r)}


def _alpha(scale: float, r: int) -> float:
    """The alpha that divided by r gives the scale to the last bit."""
    alpha = scale * r
    near = (alpha, math.nextafter(alpha, -math.inf), math.nextafter(alpha, math.inf))
    return next((a for a in near if a / r == scale), alpha)


def _dora(leaves: Mapping[str, Tensor], shape: Shape) -> dict[str, Any]:
    return _lora(leaves, shape) | {"use_dora": True}


def _scale(config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Affine) -> dict[str, Tensor]:
    r = leaves["A"].shape[-2]
    scale = config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r)
    dtype = torch.promote_types(leaves["A"].dtype, torch.float32)
    return {"_scale": torch.tensor(scale, dtype=dtype)}


def _of_dora(
    config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Affine
) -> dict[str, Tensor]:
    return {"_w_sqnorm": squared_norms(W), **_scale(config, leaves, W)}


def _rank(leaf: str, axis: int) -> Callable[[Mapping[str, Tensor], Shape], dict[str, Any]]:
    return lambda leaves, shape: {"r": leaves[leaf].shape[axis]}


def _oft(leaves: Mapping[str, Tensor], shape: Shape) -> dict[str, Any]:
    block_size = shape[1] // leaves["R"].shape[0]
    settings = {"oft_block_size": block_size, "r": 0, "use_cayley_neumann": "_neumann" in leaves}
    if "_neumann" in leaves:
        settings["num_cayley_neumann_terms"] = leaves["_neumann"].shape[-1]
    return settings


def _terms(config: Mapping[str, Any], leaves: Mapping[str, Tensor], W: Affine) -> dict[str, Tensor]:
    if not config["use_cayley_neumann"]:
        return {}
    return {"_neumann": torch.ones(config["num_cayley_neumann_terms"])}


def _road(kind: int) -> Format:
    def settings(leaves: Mapping[str, Tensor], shape: Shape) -> dict[str, Any]:
        group_size = shape[0] // leaves["theta"].shape[0]
        return {"variant": f"road_{kind}", "group_size": group_size}

    def ours(tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
        g = config["group_size"]
        return tensor.reshape(-1, *{1: (g // 2,), 2: (g,), 4: (2, g)}[kind])

    leaves = {leaf: Leaf(f"road_{leaf}", torch.Tensor.flatten, ours) for leaf in ("theta", "alpha")}
    return Format("ROAD", leaves, settings)


def _shira(leaves: Mapping[str, Tensor], shape: Shape) -> dict[str, Any]:
    return {"mask_type": "random", "r": len(leaves["values"]) // sum(shape)}


def _ia3(axis: int) -> Format:
    leaf = Leaf("ia3_l", lambda g: g.unsqueeze(axis), lambda g, _: g.flatten())
    return Format("IA3", {"g": leaf}, conv1d=True)


_LOW_RANK = {"A": Leaf("lora_A.weight"), "B": Leaf("lora_B.weight")}
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
_LORA = Format("LORA", _LOW_RANK, _lora, _scale, _PATTERNS, conv1d=True)
EMBEDDED = _LORA._replace(leaves={"A": Leaf("lora_embedding_A"), "B": Leaf("lora_embedding_B")})
"""LoRA on an embedding."""

_TURNED = Leaf("oft_R.weight", torch.neg, lambda R, config: -R)
"""PEFT's exact Cayley transform turns the other way round."""

FORMATS = {
    "lora": _LORA,
    "eva": _LORA,
    "dora": _LORA._replace(
        leaves={**_LOW_RANK, "m": Leaf("lora_magnitude_vector")},
        settings=_dora,
        constants=_of_dora,
    ),
    "delora": Format(
        "DELORA",
        {
            "A": Leaf("delora_A"),
            "B": Leaf("delora_B"),
            "lambda": Leaf("delora_lambda", lambda t: t.reshape(1), lambda t, _: t.reshape(())),
            "_w_norm": Leaf("delora_w_norm"),
        },
        _rank("A", -2),
        patterns={"r": "rank_pattern"},
    ),
    "ia3": _ia3(1),
    "ia3_ff": _ia3(0),
    "hra": Format("HRA", {"U": Leaf("hra_u", torch.t, lambda u, _: u.t())}, _rank("U", -2)),
    "vera": Format(
        "VERA",
        {"lambda_d": Leaf("vera_lambda_d"), "lambda_b": Leaf("vera_lambda_b")},
        _rank("lambda_d", -1),
        conv1d=True,
    ),
    "oft": Format("OFT", {"R": Leaf("oft_R.weight")}, _oft, _terms),
    "road1": _road(1),
    "road2": _road(2),
    "road4": _road(4),
    "shira": Format(
        "SHIRA",
        {
            "values": Leaf("shira_weight"),
            "_indices": Leaf("shira_indices", torch.Tensor.int, lambda t, _: t.double()),
        },
        _shira,
    ),
}


DEFAULTS: dict[str, dict[str, Any]] = {
    "LORA": {"lora_alpha": 8},
    "OFT": {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5},
    "ROAD": {"variant": "road_1", "group_size": 64},
}
"""What PEFT takes for a setting that a config leaves out."""

HARMLESS: dict[str, tuple[Any, ...]] = {
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "apply_GS": (None, False),
    "block_share": (None, False),
    "coft": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
}
"""The values at which settings that we have not change nothing."""


def format_of(name: str, exact: bool, embedded: bool) -> Format | None:
    """Return the format of a variant; None if PEFT has none.

    Args:
        name: The variant.
        exact: Whether it is an OFT without Neumann terms.
        embedded: Whether the site is an embedding.
    """
    found = FORMATS.get(name)
    if found is not None and name == "oft" and exact:
        return found._replace(leaves={"R": _TURNED})
    if embedded:
        return EMBEDDED if name in ("lora", "eva") else None
    return found
