"""Finding the format of a variant, and the variant of a checkpoint, among the registered ones."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lora_func.variant import PeftFormat, Variant
from lora_func.variants import all_variants

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

INERT: Mapping[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "target_parameters": (None, []),
}
"""Settings of all kinds that are accepted only at these values, at which they change nothing."""


def all_formats() -> Iterator[tuple[Variant, PeftFormat]]:
    """Yield every format of every registered variant."""
    for variant in all_variants():
        yield from ((variant, one) for one in variant.peft)


def readable_formats(peft_type: str) -> list[tuple[Variant, PeftFormat]]:
    """Return the formats in which checkpoints of a kind are read."""
    return [
        (variant, one)
        for variant, one in all_formats()
        if one.peft_type == peft_type and one.convert is None
    ]


def writable_format(
    variant: Variant, leaves: Mapping[str, Tensor], embedding: bool
) -> PeftFormat | None:
    """Return the format in which a site is written; None if PEFT has none.

    Args:
        variant: The site's variant.
        leaves: Its leaves.
        embedding: Whether the site is an embedding.
    """
    fitting = (f for f in variant.peft if f.embedding == embedding and f.holds(leaves))
    return next(fitting, None)
