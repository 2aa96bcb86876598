"""The table of variants, and the door for those of others."""

from lora_func.configs import AdapterConfig
from lora_func.variant import Variant
from lora_func.variants import (
    antipasto,
    bitfit,
    delora,
    dora,
    eva,
    full,
    hra,
    ia3,
    ia3_ff,
    lora,
    oft,
    pissa,
    road,
    shira,
    ssteer,
    ssvd,
    vera,
)

_TABLE = (
    antipasto.VARIANT,
    bitfit.VARIANT,
    delora.VARIANT,
    dora.VARIANT,
    eva.VARIANT,
    full.VARIANT,
    hra.VARIANT,
    ia3.VARIANT,
    ia3_ff.VARIANT,
    lora.VARIANT,
    oft.VARIANT,
    pissa.VARIANT,
    *road.VARIANTS,
    shira.VARIANT,
    *ssteer.VARIANTS,
    ssvd.VARIANT,
    vera.VARIANT,
)

_by_name = {variant.name: variant for variant in _TABLE}


def register(variant: Variant) -> None:
    """Add a variant of your own, which then works wherever a built-in one does.

    Args:
        variant: Its functions, its name and its config class. Registering the same variant again
            does nothing.

    Raises:
        ValueError: If the name is no identifier, or if name or config class belong to another
            variant and the config does not tell them apart by its property ``variant``.
    """
    if not variant.name.isidentifier():
        raise ValueError(
            f"{variant.name!r} cannot be part of a key; a variant's name is an identifier"
        )
    for other in _by_name.values():
        if variant == other:
            return
        alone = variant.config.variant is AdapterConfig.variant
        if variant.name == other.name or (variant.config is other.config and alone):
            raise ValueError(
                f"variant {variant.name!r} with config {variant.config.__name__}: taken by "
                f"{other.name!r} with config {other.config.__name__}; choose another name and class"
            )
    _by_name[variant.name] = variant


def by_name(name: str) -> Variant:
    """Return the variant that a key names.

    Raises:
        KeyError: If there is none of that name.
    """
    if name not in _by_name:
        raise KeyError(f"no variant {name!r}; there are {', '.join(_by_name)}")
    return _by_name[name]


def by_config(cfg: AdapterConfig) -> Variant:
    """Return the variant that a config belongs to.

    Raises:
        TypeError: If no variant has this config class.
    """
    for variant in _by_name.values():
        if type(cfg) is variant.config and cfg.variant in (None, variant.name):
            return variant
    names = ", ".join(dict.fromkeys(v.config.__name__ for v in _by_name.values()))
    raise TypeError(f"{cfg!r} is no adapter config; expected one of {names}")
