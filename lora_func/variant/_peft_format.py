"""How PEFT names and stores the leaves of a variant: a field of the variant."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lora_func.weights import Affine

Leaves: TypeAlias = Mapping[str, Tensor]
Settings: TypeAlias = Mapping[str, Any]


class PeftLeaf(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        name: PEFT's name for it, after the path of its module.
        write: From the leaf to PEFT's tensor.
        read: From PEFT's tensor to the leaf, given the config.
    """

    name: str
    write: Callable[[Tensor], Tensor] = torch.Tensor.clone
    read: Callable[[Tensor, Settings], Tensor] = lambda tensor, config: tensor.clone()


class PeftFormat(NamedTuple):
    """One kind of PEFT's adapters, as a variant is written and read.

    Attributes:
        peft_type: PEFT's name for the kind: "LORA".
        leaves: Leaf -> its tensor. Constants that no tensor holds are left out.
        settings: From a site's leaves and the shape of its weight, its part of the config. Raises
            ValueError for leaves that PEFT cannot hold.
        constants: From the config, a site's leaves and its weight, the constants that no tensor of
            a checkpoint holds.
        means: From the config and the path of a module, whether this format is meant there, where
            several formats have the same type.
        holds: From a site's leaves, whether this format can hold them.
        convert: Brings a site's leaves into the form that ``leaves`` names, before they are
            written; None for a format that is also read.
        patterns: Settings that may differ from site to site -> the setting with the exceptions.
        defaults: PEFT's values for settings that a config leaves out.
        inert: Settings that are accepted only at these values, at which they change nothing.
        listed: A setting that lists the sites of this format, if PEFT tells formats apart by it.
        shared: Leaf under ``*`` -> the full name of its tensor.
        embedding: True if PEFT stores this format for embeddings, and for nothing else.
        conv1d: True if PEFT supports transformers' ``Conv1D``.
    """

    peft_type: str
    leaves: Mapping[str, PeftLeaf]
    settings: Callable[[Leaves, tuple[int, int]], dict[str, Any]] = lambda leaves, shape: {}
    constants: Callable[[Settings, Leaves, Affine], dict[str, Tensor]] = lambda *_: {}
    means: Callable[[Settings, str], bool] = lambda config, path: True
    holds: Callable[[Leaves], bool] = lambda leaves: True
    convert: Callable[[Leaves], dict[str, Tensor]] | None = None
    patterns: Mapping[str, str] = {}
    defaults: Mapping[str, Any] = {}
    inert: Mapping[str, tuple[Any, ...]] = {}
    listed: str | None = None
    shared: Mapping[str, str] = {}
    embedding: bool = False
    conv1d: bool = False


def matches_path(names: str | Sequence[str] | None, path: str) -> bool:
    """True if PEFT finds a module by names: a regular expression for the path, or path endings."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return path.endswith(tuple(names or ()))
