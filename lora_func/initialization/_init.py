"""Making an adapter for a model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from lora_func.adapter import SHARED, Key, check_site
from lora_func.configs import AdapterConfig
from lora_func.initialization._statistics import Named, gather_statistics
from lora_func.initialization._weights import device_of, frozen_weight
from lora_func.modules import attached_path, find_site, inner_model
from lora_func.numerics import generator_for
from lora_func.runtime import LossFn, check_unattached
from lora_func.targeting import Target, find_targets
from lora_func.variant import Params, Variant
from lora_func.variants import by_config
from lora_func.weights import is_stack, loaded, matrices

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def init(
    model: nn.Module,
    cfg: AdapterConfig | Sequence[AdapterConfig],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    data: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    group: Any = None,
) -> Params:
    r"""Make an adapter, with which the model still computes what it did without it.

    A site's leaves depend only on the seed, its path, its config, its weight and the data. They do
    not depend on the other sites, the device or the global random state, which does not change.
    Only what all sites share (projections under ``*``, ranks shared out over sites) depends on all
    of them.

    Args:
        model: The frozen model; only read.
        cfg: The config, or several configs that name different sites.
        seed: Any integer.
        dtype: Dtype of the trained leaves. Keep float32 on a half-precision model: small updates
            would be lost to rounding.
        data: Calibration batches, as for ``fcall``, for configs that take them; pairs (positive,
            negative) of batches for configs that compare. The model runs over them once, in
            eval mode; ``attention_mask`` leaves out padding.
        loss_fn: As for ``fcall``, for configs that learn from gradients.
        group: Ranks of torch.distributed, each with its own part of the data; all get one start.

    Returns:
        ``"{site}.{variant}.{leaf}" -> tensor``, each on the device of its site's weight. Trained
        leaves require grad, constants (``_``) do not.

    Raises:
        TypeError: If an argument has another type, cfg is no config of a registered variant, or a
            pattern names a layer that cannot be adapted.
        ValueError: If a pattern matches nothing, two configs name one site, a number does not fit a
            site's shape, a weight has no data yet, dtype cannot hold a copied parameter, a variant
            makes leaves that do not fit its own axes, or calibration data is missing, too small, or
            taken by no config.
        BusyModelError: If the model has an adapter attached, or there is data and the model is
            running with an adapter.

    Examples:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> cfg = [lf.LoRA(r=2, target_modules="0"), lf.Full(target_parameters=r"^1\.")]
        >>> list(lf.init(model, cfg))
        ['0.lora.A', '0.lora.B', '0.lora._scale', '1.full.weight', '1.full.bias']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: got {seed!r}, expected an int")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype: got {dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    model = inner_model(model)
    check_unattached(model, attached_path(model))
    configs = (cfg,) if isinstance(cfg, AdapterConfig) else tuple(cfg)
    if not configs:
        raise ValueError("cfg: got no config")
    with torch.inference_mode(False):  # an inference tensor could not be trained
        named = [(config, find_targets(model, config).sites) for config in configs]
        _check_overlaps(named)
        stats = {} if data is None else gather_statistics(model, named, data, loss_fn, group)
        return _make(model, named, seed, dtype, stats)


def _make(
    model: nn.Module,
    named: Sequence[Named],
    seed: int,
    dtype: torch.dtype,
    stats: Mapping[str, Any],
) -> Params:
    params: Params = {}
    for config, targets in named:
        variant = by_config(config)
        for key, leaf in _leaves(model, targets, config, variant, seed, stats, dtype).items():
            if str(key) in params:
                raise ValueError(
                    f"{key}: two {variant.name} configs would share this constant; make them one"
                )
            params[str(key)] = leaf
    return params


def _leaves(
    model: nn.Module,
    targets: Sequence[Target],
    cfg: AdapterConfig,
    variant: Variant,
    seed: int,
    stats: Mapping[str, Any],
    dtype: torch.dtype,
) -> dict[Key, Tensor]:
    leaves: dict[Key, Tensor] = {}
    named = {target.site: target for target in targets}
    weights = {target.site: frozen_weight(model, target) for target in targets}
    common: Mapping[str, Tensor] = {}
    if variant.shared is not None:
        singles = {site: matrices(W)[0] for site, W in weights.items()}
        with torch.device("cpu"):
            common = variant.shared(singles, cfg, _generator(seed, SHARED, variant.name))
        with loaded(find_site(model, targets[0].site)[0]):
            first = frozen_weight(model, targets[0])
        leaves |= _placed(SHARED, [common], variant, dtype, first)
    resolved = {site: (cfg.at(site), stats.get(site)) for site in weights}
    if variant.conclude is not None and stats:
        configs = {site: config for site, (config, _) in resolved.items()}
        resolved = variant.conclude(weights, configs, {site: stats[site] for site in weights})
    title = f"init {variant.name}"
    for site, (config, seen) in tqdm(resolved.items(), title, unit="site", delay=2, disable=None):
        generator = _generator(seed, site, variant.name)
        with loaded(find_site(model, site)[0]):
            W = frozen_weight(model, named[site])
            try:
                with torch.device("cpu"):
                    each = [variant.init(one, config, generator, seen) for one in matrices(W)]
                _check_made(variant, {**common, **each[0]}, W)
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"{site}: {variant.name}: {error}") from error
            leaves |= _placed(site, each, variant, dtype, W)
    return leaves


def _placed(
    site: str,
    each: Sequence[Mapping[str, Tensor]],
    variant: Variant,
    dtype: torch.dtype,
    W: Any,
) -> dict[Key, Tensor]:
    """The leaves of one site on the device of its weight; those of a stack of weights stacked."""
    placed: dict[Key, Tensor] = {}
    for name in each[0]:
        key = Key(site, variant.name, name)
        stored = [_stored(key, one[name], variant, dtype).to(device_of(W)) for one in each]
        leaf = torch.stack(stored) if is_stack(W) and site != SHARED else stored[0]
        placed[key] = leaf.requires_grad_(not key.is_constant)
    return placed


def _check_made(variant: Variant, made: Mapping[str, Tensor], W: Any) -> None:
    """Check the leaves of one site against the axes that the variant names."""
    if variant.parameters is not None:
        return
    shapes = {leaf: tuple(tensor.shape) for leaf, tensor in made.items()}
    try:
        check_site("", variant, shapes, set(), matrices(W)[0])
    except ValueError as error:
        raise ValueError(f"init made leaves that do not fit the variant's axes: {error}") from None


def _generator(seed: int, site: str, variant: str) -> Generator:
    return generator_for(f"{seed}/{site}/{variant}")


def _stored(key: Key, leaf: Tensor, variant: Variant, dtype: torch.dtype) -> Tensor:
    leaf = leaf.detach()
    if not leaf.is_floating_point():
        return leaf.double()  # torch.func.grad takes floating-point leaves only
    if key.is_constant and leaf.ndim == 0:
        return leaf.to(torch.promote_types(dtype, torch.float32))
    if key.is_constant and leaf.ndim == 1:
        return leaf.clone()  # small; some starts are exact only at the precision of init
    if variant.parameters is not None and torch.promote_types(dtype, leaf.dtype) != dtype:
        raise ValueError(
            f"{key}: dtype={dtype} cannot hold this {leaf.dtype} parameter exactly; "
            f"pass dtype={torch.promote_types(dtype, leaf.dtype)}"
        )
    return leaf.to(dtype).contiguous()


def _check_overlaps(named: Sequence[Named]) -> None:
    owner: dict[tuple[str, str], AdapterConfig] = {}
    for config, targets in named:
        both = ("weight",) if by_config(config).bias is None else ("weight", "bias")
        for target in targets:
            for parameter in target.parameters or both:
                other = owner.setdefault((target.site, parameter), config)
                if other is not config:
                    raise ValueError(
                        f"{target.site}: its {parameter} is named by two configs, {other!r} and "
                        f"{config!r}; it takes one; narrow one of them with its patterns or layers"
                    )
