"""The grammar of an adapter's keys: ``{site}.{variant}.{leaf}``."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lora_func.variant import Params

SHARED = "*"
"""The site of constants that all sites of a variant share."""

RANK = "_rank"
"""The constant that ``stack`` adds if it padded ranks: the rank of each adapter."""


class Key(NamedTuple):
    """A key's parts.

    Attributes:
        site: Path of the adapted module; empty for the model itself, ``*`` for what sites share.
        variant: The variant's name.
        leaf: The name of the tensor; a leading ``_`` marks a constant.
    """

    site: str
    variant: str
    leaf: str

    @property
    def is_constant(self) -> bool:
        """True if the leaf is never trained."""
        return self.leaf.startswith("_")

    def __str__(self) -> str:
        return ".".join(self)


def parse(key: str) -> Key:
    """Split a key.

    Returns:
        Its parts.

    Raises:
        KeyError: If it has fewer than three parts.
    """
    parts = key.rsplit(".", 2)
    if len(parts) != 3 or not all(parts[1:]):
        raise KeyError(f'{key!r} is no adapter key; expected "site.variant.leaf"')
    return Key(*parts)


def group(keys: Iterable[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Group keys by site and variant, each with the shared constants of its variant.

    Returns:
        (site, variant) -> {leaf: key}, in the order of the keys, without the shared ones.
    """
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for key in keys:
        site, variant, leaf = parse(key)
        groups.setdefault((site, variant), {})[leaf] = key
    shared = {variant: groups.pop((site, variant)) for site, variant in [*groups] if site == SHARED}
    return {
        (site, variant): {**shared.get(variant, {}), **leaves}
        for (site, variant), leaves in groups.items()
    }


def check_adapter(params: object) -> None:
    """Check that an adapter, or a stack, is one dict.

    Raises:
        TypeError: If it is anything else, such as a list of adapters.
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params: got a {type(params).__name__}; expected one adapter, a dict of tensors; "
            "vcall and clip_grad_norm take several, and stack makes one dict of them"
        )


def partition(params: Mapping[str, Tensor]) -> tuple[Params, Params]:
    """Split an adapter into trained leaves and constants.

    ``{**trained, **constants}`` joins it again.

    Args:
        params: An adapter, or a stack of them.

    Returns:
        (trained, constants). A constant is a leaf whose name starts with ``_``.

    Raises:
        KeyError: If a key is not of the form ``site.variant.leaf``.
        TypeError: If params is no mapping.

    Examples:
        >>> import torch, lora_func as lf
        >>> trained, constants = lf.partition(lf.init(torch.nn.Linear(4, 4), lf.LoRA(r=2)))
        >>> list(trained), list(constants)
        (['.lora.A', '.lora.B'], ['.lora._scale'])
    """
    check_adapter(params)
    constants = {key: leaf for key, leaf in params.items() if parse(key).is_constant}
    return {key: leaf for key, leaf in params.items() if key not in constants}, constants


def as_trainable(
    leaves: Mapping[str, Tensor],
    device: str | torch.device | Mapping[str, torch.device] | None = None,
) -> Params:
    """Return leaves in the form that ``init`` gives: trained leaves require grad.

    Args:
        leaves: The leaves; the result may share their memory.
        device: The device of the result, or of each leaf by its key; None keeps each where it is.
    """
    devices = device if isinstance(device, Mapping) else dict.fromkeys(leaves, device)
    with torch.inference_mode(False):
        return {
            key: leaf.detach().to(devices[key]).requires_grad_(not parse(key).is_constant)
            for key, leaf in leaves.items()
        }
