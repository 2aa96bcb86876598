"""The statistics of the sites that take calibration data, on one rank or on several."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial, reduce
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor, nn

from lora_func.compat import tree_map_only
from lora_func.configs import AdapterConfig
from lora_func.initialization._calibration import Observer, calibrate
from lora_func.modules import find_site
from lora_func.runtime import LossFn, tensors_of
from lora_func.targeting import Target
from lora_func.variants import by_config
from lora_func.weights import is_linear

Named: TypeAlias = tuple[AdapterConfig, Sequence[Target]]
"""A config and the sites that it names."""


def gather_statistics(
    model: nn.Module,
    named: Sequence[Named],
    data: Iterable[Any],
    loss_fn: LossFn | None,
    group: Any,
) -> dict[str, Any]:
    """Run the frozen model over calibration data.

    Args:
        model: The model.
        named: Each config and its sites.
        data: As for ``init``.
        loss_fn: As for ``init``.
        group: As for ``init``.

    Returns:
        The statistics of each site that takes data.

    Raises:
        TypeError: If a site is no linear layer, or has no ``join`` for several ranks.
        ValueError: If no config takes data, or several take different kinds.
        RuntimeError: If another rank of the group failed.
    """
    takers = [
        (config, targets, observe)
        for config, targets in named
        if config.calibration is not None and (observe := by_config(config).observe) is not None
    ]
    kinds = {type(config).__name__: config.calibration for config, _, _ in takers}
    if len({*kinds.values()}) != 1:
        raise ValueError(
            f"data: taken by {kinds or 'none of the configs'}, of one kind at a time; init them "
            "apart, each with its own data, and join the dicts"
        )
    for _, targets, _ in takers:
        for target in targets:
            _check_observable(model, target.site)
    observers = {
        target.site: Observer(observe, config)
        for config, targets, observe in takers
        for target in targets
    }
    if group is None:
        return calibrate(model, observers, data, loss_fn)
    try:
        stats = calibrate(model, observers, data, loss_fn)
    except Exception as error:
        _exchanged(group, f"{type(error).__name__}: {error}")
        raise
    joins = {
        target.site: by_config(config).join for config, targets, _ in takers for target in targets
    }
    return _joined_over(group, stats, joins)


def _check_observable(model: nn.Module, site: str) -> None:
    module, parameter = find_site(model, site)
    if parameter is not None or not is_linear(module):
        raise TypeError(
            f"{site}: data is gathered at the inputs of linear layers, this is a "
            f"{type(module).__name__}; leave it out"
        )


def _joined_over(group: Any, stats: Mapping[str, Any], joins: Mapping[str, Any]) -> dict[str, Any]:
    """Join the statistics that the ranks of a group gathered, in the order of the ranks.

    Args:
        group: The ranks.
        stats: The statistics of each site on this rank; sites with the same input share theirs.
        joins: The ``Variant.join`` of each site.

    Returns:
        The same on all ranks; sites share what they shared.

    Raises:
        TypeError: If a variant has no ``join``.
        RuntimeError: If another rank failed.
    """
    missing = [site for site, join in joins.items() if join is None]
    if missing:
        raise TypeError(
            f"{missing[0]}: its variant has no `join`, so that its statistics of several ranks "
            "cannot be joined; gather the data on one rank, and leave out group"
        )
    unique = {id(found): site for site, found in stats.items()}
    sent = [tree_map_only(Tensor, Tensor.cpu, stats[site]) for site in unique.values()]
    received = _exchanged(group, sent)
    failed = [one for one in received if isinstance(one, str)]
    if failed:
        raise RuntimeError(f"data: another rank of the group failed with {failed[0]}")
    joined = {}
    for i, (identity, site) in enumerate(unique.items()):
        device = next((leaf.device for leaf in tensors_of(stats[site])), "cpu")
        of_all = reduce(joins[site], [rank[i] for rank in received])
        joined[identity] = tree_map_only(Tensor, partial(Tensor.to, device=device), of_all)
    return {site: joined[id(found)] for site, found in stats.items()}


def _exchanged(group: Any, mine: Any) -> list[Any]:
    received: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(received, mine, group=group)
    return received
