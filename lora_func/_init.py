"""Making an adapter for a model."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from lora_func._config import AdapterConfig
from lora_func._keys import SHARED, Key
from lora_func._modules import uncompiled
from lora_func._targets import Target, find_targets
from lora_func._types import Params, Variant
from lora_func._weight import affine
from lora_func.variants import by_config

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def init(
    model: nn.Module,
    cfg: AdapterConfig | Sequence[AdapterConfig],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Params:
    r"""Make an adapter, with which the model computes what it did without.

    A site's leaves depend on the seed, its path, its config and its weight, and on nothing else:
    neither on what else is targeted, nor on the device, nor on the global random state, which is
    left alone.

    Args:
        model: The frozen model; only read.
        cfg: What to adapt and how. Several configs must name different sites.
        seed: Any integer.
        dtype: Of the trained leaves. Keep float32 on a half-precision model, or small updates are
            lost to rounding.

    Returns:
        ``"{site}.{variant}.{leaf}" -> tensor``, each on the device of its site's weight. Trained
        leaves require grad, constants (``_``) do not.

    Raises:
        TypeError: If an argument is of another kind, cfg is no config of a registered variant, or a
            pattern names a layer that cannot be adapted.
        ValueError: If a pattern matches nothing, two configs name one site, a number does not fit a
            site's shape, a weight has no data yet, or dtype cannot hold a parameter that ``Full``
            copies.

    Example:
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
    model = uncompiled(model)
    configs = (cfg,) if isinstance(cfg, AdapterConfig) else tuple(cfg)
    if not configs:
        raise ValueError("cfg: got no config")
    plans = [(config, find_targets(model, config).sites) for config in configs]
    _refuse_overlaps(plans)
    params: Params = {}
    for config, targets in plans:
        variant = by_config(config)
        for key, leaf in _leaves(model, config, variant, targets, seed).items():
            if str(key) in params:
                raise ValueError(
                    f"{key}: two {variant.name} configs would share this constant; make them one"
                )
            params[str(key)] = _stored(key, leaf, variant, dtype)
    return params


def _leaves(
    model: nn.Module, cfg: AdapterConfig, variant: Variant, targets: Sequence[Target], seed: int
) -> dict[Key, Tensor]:
    weights = {target.site: _frozen(model, target) for target in targets}
    devices = {site: _device(W) for site, W in weights.items()}
    leaves: dict[Key, Tensor] = {}
    if variant.shared is not None:
        with torch.device("cpu"):
            made = variant.shared(weights, cfg, _generator(seed, SHARED, variant.name))
        first = next(iter(devices.values()))
        leaves |= {Key(SHARED, variant.name, name): leaf.to(first) for name, leaf in made.items()}
    title = f"init {variant.name}"
    for site, W in tqdm(weights.items(), title, unit="site", delay=2, disable=None):
        generator = _generator(seed, site, variant.name)
        try:
            with torch.device("cpu"):
                made = variant.init(W, cfg.at(site), generator, None)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{site}: {variant.name}: {error}") from error
        device = devices[site]
        leaves |= {Key(site, variant.name, name): leaf.to(device) for name, leaf in made.items()}
    return leaves


def _device(W: Any) -> torch.device:
    device = next(iter(W.values())).device if isinstance(W, Mapping) else W.device
    assert isinstance(device, torch.device)
    return device


def _frozen(model: nn.Module, target: Target) -> Any:
    module = model.get_submodule(target.site)
    own = {name: getattr(module, name) for name in target.parameters}
    for tensor in own.values() or (affine(module).weight,):
        if tensor.is_meta or is_lazy(tensor):
            raise ValueError(f"{target.site}: its weight has no data yet; load the model first")
        if not tensor.is_floating_point():
            raise TypeError(
                f"{target.site}: its weight is {tensor.dtype}; accepted are floating-point weights"
            )
    return own or affine(module)


def _generator(seed: int, site: str, variant: str) -> Generator:
    digest = hashlib.sha256(f"{seed}/{site}/{variant}".encode()).digest()
    return Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def _stored(key: Key, leaf: Tensor, variant: Variant, dtype: torch.dtype) -> Tensor:
    leaf = leaf.detach()
    if not leaf.is_floating_point():
        return leaf.double()  # torch.func.grad takes no integers
    if key.is_constant and leaf.ndim == 0:
        return leaf.to(torch.promote_types(dtype, torch.float32))
    if variant.parameters is not None and torch.promote_types(dtype, leaf.dtype) != dtype:
        raise ValueError(
            f"{key}: dtype={dtype} cannot hold this {leaf.dtype} parameter exactly; "
            f"pass dtype={torch.promote_types(dtype, leaf.dtype)}"
        )
    return leaf.to(dtype).requires_grad_(not key.is_constant)


def _refuse_overlaps(plans: Sequence[tuple[AdapterConfig, Sequence[Target]]]) -> None:
    owner: dict[str, AdapterConfig] = {}
    for config, targets in plans:
        for target in targets:
            if target.site in owner:
                raise ValueError(
                    f"{target.site}: named by two configs, {owner[target.site]!r} and {config!r}; "
                    "a site takes one; narrow one of them with its patterns or layers"
                )
            owner[target.site] = config
