"""Stacks: K adapters as one dict with a leading axis, for ``torch.vmap``."""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_func.adapter._keys import RANK, Key, group, parse
from lora_func.variant import Params, ranks_of
from lora_func.variants import by_name


def stack(adapters: Iterable[Mapping[str, Tensor]]) -> Params:
    """Stack adapters of the same sites and variants along a new first axis.

    Ranks may differ if the variant allows it: the rank axis is padded with zeros, which receive
    no gradient and add nothing. ``stack`` is differentiable: keep the adapters as optimizer leaves,
    each with its own settings, and stack them inside the step.

    Args:
        adapters: At least one.

    Returns:
        Key -> tensor (K, ...). If ranks were padded, a constant ``_rank`` (K,) remembers them.

    Raises:
        ValueError: If there is none, keys differ, ranks differ in a variant that cannot be padded,
            or shapes, dtypes or devices of a leaf differ otherwise.

    Examples:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Linear(4, 4)
        >>> stacked = lf.stack([lf.init(model, lf.LoRA(r=r)) for r in (1, 3)])
        >>> {key: tuple(leaf.shape) for key, leaf in stacked.items()}
        {'.lora.A': (2, 3, 4), '.lora.B': (2, 4, 3), '.lora._scale': (2,), '.lora._rank': (2,)}
        >>> losses = torch.vmap(lf.fcall, in_dims=(None, 0, None))(model, stacked, torch.ones(5, 4))
    """
    adapters = [*adapters]
    _check_same_keys(adapters)
    stacked: Params = {}
    for (site, name), keys in group(adapters[0]).items():
        variant = by_name(name)
        ranks = ranks_of(
            variant, [{leaf: one[key] for leaf, key in keys.items()} for one in adapters]
        )
        mixed = len({*ranks}) > 1
        padded = variant.rank_axes if mixed else {}
        if mixed and not variant.pads:
            raise ValueError(
                f"{site}: ranks {ranks} of {name} cannot be padded exactly; stack adapters of one "
                "rank"
            )
        for leaf, key in keys.items():
            leaves = [adapter[key] for adapter in adapters]
            if leaf in padded:
                leaves = [pad_axes(tensor, padded[leaf], max(ranks)) for tensor in leaves]
            if key not in stacked:
                stacked[key] = _stacked(key, leaves)
        if mixed:
            remembered = torch.tensor(ranks, dtype=torch.float64, device=leaves[0].device)
            for owner in {parse(key).site for key in keys.values()}:
                stacked[str(Key(owner, name, RANK))] = remembered
    return {**{key: stacked[key] for key in adapters[0]}, **stacked}


def unstack(stacked: Mapping[str, Tensor]) -> list[Params]:
    """Split a stack into its adapters, each of its own rank.

    Args:
        stacked: The result of ``stack``, possibly trained.

    Returns:
        K adapters, as differentiable copies; ``unstack(stack(adapters))`` equals ``adapters``.

    Raises:
        ValueError: If it is one adapter, or the leaves have no common first axis.

    Examples:
        >>> import torch, lora_func as lf
        >>> stacked = lf.stack([lf.init(torch.nn.Linear(4, 4), lf.LoRA(r=r)) for r in (1, 3)])
        >>> [adapter[".lora.A"].shape[0] for adapter in lf.unstack(stacked)]
        [1, 3]
    """
    ranks = {key: stacked.get(str(parse(key)._replace(leaf=RANK))) for key in stacked}
    return [
        {
            key: _cut(key, leaf[i], ranks[key], i)
            for key, leaf in stacked.items()
            if parse(key).leaf != RANK
        }
        for i in range(size_of(stacked))
    ]


def size_of(stacked: Mapping[str, Tensor]) -> int:
    """Return the number of adapters in a stack.

    Raises:
        ValueError: If it is one adapter, or the leaves have no common first axis.
    """
    for key, leaf in stacked.items():
        if _is_of_one_adapter(key, leaf):
            raise ValueError(
                f"{key}: got shape {tuple(leaf.shape)}, which is that of one adapter, expected a "
                "stack; stack([params]) makes one"
            )
    sizes: dict[int, str] = {}
    for key, leaf in stacked.items():
        sizes.setdefault(leaf.shape[0], key)
    if len(sizes) != 1:
        raise ValueError(
            f"stacked: leaves have the first axes {sizes}, expected one number of adapters; "
            "stack([...]) makes a stack of several adapters"
        )
    return next(iter(sizes))


def holds_stack(params: Mapping[str, Tensor]) -> bool:
    """Tell a stack from an adapter by its leaves alone.

    Returns:
        True if all leaves have one axis more than their variants name, as those of an adapter of
        stacked experts alone have too.

    Raises:
        ValueError: If all leaves are parameters, whose axes only the model tells.
    """
    if any(parse(key).leaf == RANK for key in params):
        return True
    if not any(by_name(parse(key).variant).axes for key in params):
        raise ValueError(
            f"{next(iter(params))}: only the model tells whether this leaf is of an adapter or of "
            "a stack; pass model="
        )
    return not any(_is_of_one_adapter(key, leaf) for key, leaf in params.items())


def _is_of_one_adapter(key: str, leaf: Tensor) -> bool:
    """True if a leaf has the axes that its variant names, and no axis of a stack in front."""
    own = parse(key)
    counts = {len(words) for words in by_name(own.variant).axes.get(own.leaf, ())}
    return not leaf.ndim or (leaf.ndim in counts and leaf.ndim - 1 not in counts)


def _check_same_keys(adapters: Sequence[Mapping[str, Tensor]]) -> None:
    if not adapters:
        raise ValueError("adapters: got none")
    first = adapters[0]
    for i, adapter in enumerate(adapters):
        if adapter.keys() != first.keys():
            differing = sorted(adapter.keys() ^ first.keys())
            raise ValueError(
                f"adapters 0 and {i} differ in their keys, {differing[:3]}; stack adapters of the "
                "same sites and variants"
            )
    if any(parse(key).leaf == RANK for key in first):
        raise ValueError(
            "adapters: got stacks of mixed rank, expected adapters; unstack them first"
        )


def pad_axes(leaf: Tensor, axes: Sequence[int], rank: int) -> Tensor:
    """Fill the rank axes of a leaf, counted from the end, with zeros up to a rank."""
    for axis in axes:
        leaf = F.pad(leaf, [0] * (2 * -axis - 1) + [rank - leaf.shape[axis]])
    return leaf


def _cut(key: str, leaf: Tensor, ranks: Tensor | None, i: int) -> Tensor:
    _, name, leaf_name = parse(key)
    axes = by_name(name).rank_axes.get(leaf_name, ())
    if ranks is None or not axes:
        return leaf.clone()
    for axis in axes:
        leaf = leaf.narrow(axis, 0, int(ranks[i]))
    return leaf.clone(memory_format=torch.contiguous_format)


def _stacked(key: str, leaves: Sequence[Tensor]) -> Tensor:
    kinds = {(tuple(leaf.shape), leaf.dtype, leaf.device) for leaf in leaves}
    if len(kinds) > 1:
        raise ValueError(
            f"{key}: cannot stack leaves that differ, {sorted(map(str, kinds))}; make shapes, "
            "dtypes and devices equal"
        )
    return torch.stack([*leaves])
