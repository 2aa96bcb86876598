"""How PEFT names and stores the leaves of a variant: a field of the variant."""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lora_func.weights import Affine

Leaves: TypeAlias = Mapping[str, Tensor]
Settings: TypeAlias = Mapping[str, Any]


Layout: TypeAlias = Literal["plain", "kernel", "ones", "major", "minor"]


class PeftLeaf(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        name: PEFT's name for it, after the path of its module.
        write: From the leaf to PEFT's tensor.
        read: From PEFT's tensor to the leaf, given the config.
        layout: How a convolution or a stack of matrices stands in PEFT's tensor. "kernel": the last
            axis is split into channels and the axes of the kernel. "ones": axes of size 1 follow,
            as many as the kernel has. "major" and "minor": the matrices of a stack follow one
            another along the first axis, or alternate along the last one.
    """

    name: str
    write: Callable[[Tensor], Tensor] = torch.Tensor.clone
    read: Callable[[Tensor, Settings], Tensor] = lambda tensor, config: tensor.clone()
    layout: Layout = "plain"

    def to_peft(self, leaf: Tensor, sizes: Sequence[int]) -> Tensor:
        """Write a leaf.

        Args:
            leaf: The leaf.
            sizes: Of the kernel of a convolution, or the number of matrices in a stack.

        Returns:
            PEFT's tensor.
        """
        if self.layout == "major":
            return self.write(leaf.flatten(0, len(sizes))).contiguous()
        if self.layout == "minor":
            return self.write(leaf.movedim(0, -1).flatten(1) if sizes else leaf).contiguous()
        tensor = self.write(leaf)
        if self.layout == "kernel":
            tensor = tensor.reshape(*tensor.shape[:-1], -1, *sizes)
        elif self.layout == "ones":
            tensor = tensor.reshape(*tensor.shape, *[1] * len(sizes))
        return tensor.contiguous()

    def from_peft(self, tensor: Tensor, config: Settings, sizes: Sequence[int]) -> Tensor:
        """Read a leaf.

        Args:
            tensor: PEFT's tensor.
            config: The config of its site.
            sizes: Of the kernel of a convolution, or the number of matrices in a stack.

        Returns:
            The leaf.
        """
        if self.layout == "major" and sizes:
            tensor = tensor.reshape(*sizes, -1, *tensor.shape[1:])
        elif self.layout == "minor" and sizes:
            tensor = tensor.reshape(len(tensor), -1, *sizes).movedim(-1, 0)
        elif self.layout == "kernel":
            tensor = tensor.flatten(-1 - len(sizes))
        elif self.layout == "ones":
            tensor = tensor.reshape(tensor.shape[: tensor.ndim - len(sizes)])
        return self.read(tensor, config).contiguous()


CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")


def differs_on_convolution(module: Any) -> str | None:
    """Say why PEFT's adapter of a convolution is no change of its weight; None if it is."""
    if getattr(module, "groups", 1) > 1:
        return "its groups share PEFT's adapter, which mixes them"
    return differs_in_padding(module)


def differs_in_padding(module: Any) -> str | None:
    """Say why PEFT's adapter, which has the shape of the weight, is none; None if it is."""
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"PEFT pads the adapter's input with zeros, the layer by {module.padding_mode!r}"
    return None


def regular_expression(paths: Sequence[str]) -> Any:
    """Return a regular expression that matches paths alone; PEFT wants a list for none."""
    return "|".join(map(re.escape, paths)) if paths else []


class PeftFormat(NamedTuple):
    """One kind of PEFT's adapters, as a variant is written and read.

    A setting of one of PEFT's sub-configs has a dotted name: "use_bdlora.nblocks".

    Attributes:
        peft_type: PEFT's name for the kind: "LORA".
        leaves: Leaf -> its tensor. Constants that no tensor holds are left out.
        settings: From a site's leaves and the shape of its weight, its part of the config; a
            frozenset where each of several values gives these leaves. Raises ValueError for leaves
            that PEFT cannot hold.
        constants: From the config, a site's leaves and its weight, the constants that no tensor of
            a checkpoint holds.
        means: From the config and the path of a module, whether this format is meant there, where
            several formats have the same type.
        holds: From a site's leaves, whether this format can hold them.
        convert: Brings a site's leaves into the form that ``leaves`` names, before they are
            written; None for a format that is also read.
        patterns: Settings that may differ from site to site -> the setting with the exceptions.
        defaults: PEFT's values for settings that a config leaves out.
        inert: Settings that are accepted only at these values, at which they change nothing else
            than this format says.
        ignored: Settings that change nothing in a checkpoint that is loaded, at any value.
        listed: A setting that lists the sites of this format, if PEFT tells formats apart by it.
        lists: From the paths of its sites, the value of that setting; None to leave it out.
        shared: Leaf under ``*`` -> the full name of its tensor.
        by_channels: True if ``settings`` takes the channels of a convolution as the shape, without
            the axes of the kernel.
        one_rank: True if PEFT has one rank for all sites: smaller ones are written with zeros.
        lowers_rank: True if PEFT takes a lower rank than the config's where a weight is small.
        numbered: The name of a tensor that PEFT stores with the number of its site, in the order of
            the model, in place of the path.
        lists_of: Names of tensors that PEFT stores as one for each index of their first axis:
            "name.0.weight", "name.1.weight".
        copies: Names of tensors at a module that repeat what ``shared`` holds. They are not
            written: PEFT warns, and does without them.
        layers: The layers on which PEFT stores this format: classes by name (``CONVOLUTIONS`` are
            three), "Parameter" for parameters, "in_proj" and "out_proj" for those of torch's
            attention.
        refuses: From a module, why PEFT computes something else there; None if it does not.
        whole: For a variant that replaces parameters, what stands before their names; None else.
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
    ignored: Collection[str] = ()
    listed: str | None = None
    lists: Callable[[Sequence[str]], Any] = regular_expression
    shared: Mapping[str, str] = {}
    by_channels: bool = False
    one_rank: bool = False
    lowers_rank: bool = False
    numbered: str | None = None
    lists_of: Collection[str] = ()
    copies: Collection[str] = ()
    layers: Collection[str] = ("Linear",)
    refuses: Callable[[Any], str | None] = lambda module: None
    whole: str | None = None

    def accepts(self, config: Settings) -> bool:
        """True if the settings in ``inert`` have values that this format takes."""
        return all(config.get(name) in values for name, values in self.inert.items())

    def settings_at(
        self, leaves: Leaves, shape: tuple[int, int], sizes: Sequence[int]
    ) -> dict[str, Any]:
        """Return the part of the config for one site.

        Args:
            leaves: Its leaves.
            shape: (d_out, d_in) of its weight.
            sizes: Of the kernel of a convolution, or the number of matrices in a stack.

        Returns:
            The settings.
        """
        d_out, d_in = shape
        return self.settings(
            leaves, (d_out, d_in // math.prod(sizes) if self.by_channels else d_in)
        )


def matches_path(names: str | Sequence[str] | None, path: str) -> bool:
    """True if PEFT finds a module by names: a regular expression for the path, or path endings."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return path.endswith(tuple(names or ()))
