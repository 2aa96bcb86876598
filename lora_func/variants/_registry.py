"""The table of variants, to which other packages may add their own."""

from collections.abc import Iterator
from contextlib import contextmanager

from lora_func.configs import AdapterConfig
from lora_func.variant import Variant, check_variant

_by_name: dict[str, Variant] = {}


def register(variant: Variant, *, overwrite: bool = False) -> None:
    """Add a variant, which then works wherever a built-in variant does.

    Args:
        variant: Its functions, its name and its config class. Registering an equal variant again
            has no effect.
        overwrite: Whether to replace a variant of the same name, for example after a change in a
            notebook.

    Raises:
        ValueError: If the variant is malformed, or its name or config class belongs to another
            variant and ``overwrite`` is False.
    """
    check_variant(variant)
    for other in all_variants():
        if variant == other:
            return
        alone = variant.config.variant is AdapterConfig.variant
        if variant.name == other.name and not overwrite:
            raise ValueError(
                f"variant {variant.name!r}: the name is taken, by config {other.config.__name__}; "
                "choose another name, or pass overwrite=True to replace that variant"
            )
        if variant.name != other.name and variant.config is other.config and alone:
            raise ValueError(
                f"variant {variant.name!r}: config {variant.config.__name__} belongs to "
                f"{other.name!r}; choose another class, or give it a property `variant` that names "
                "the variant that is meant"
            )
    _by_name[variant.name] = variant


@contextmanager
def registered(variant: Variant) -> Iterator[None]:
    """Register a variant inside a ``with`` block; afterwards the table is what it was."""
    before = dict(_by_name)
    try:
        register(variant, overwrite=True)
        yield
    finally:
        _by_name.clear()
        _by_name.update(before)


def all_variants() -> tuple[Variant, ...]:
    """Return the registered variants."""
    return (*_by_name.values(),)


def by_name(name: str) -> Variant:
    """Return the variant that a key names.

    Raises:
        KeyError: If no variant has the name.
    """
    if name not in _by_name:
        raise KeyError(
            f"no variant {name!r}; there are {', '.join(_by_name)}; one of another package must "
            "be registered first, by importing that package"
        )
    return _by_name[name]


def by_config(cfg: AdapterConfig) -> Variant:
    """Return the variant that a config belongs to.

    Raises:
        TypeError: If no variant has this config class.
    """
    fitting = [v for v in all_variants() if v.config is type(cfg)]
    named = [v for v in fitting if cfg.variant in (None, v.name)]
    if named:
        return named[-1]
    names = ", ".join(dict.fromkeys(v.config.__name__ for v in all_variants()))
    raise TypeError(f"{cfg!r} is no adapter config; expected one of {names}")
