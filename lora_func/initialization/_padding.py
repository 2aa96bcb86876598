"""Which rows of a site's input are real tokens, and which are padding."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.runtime import arguments

_NAMES = ("attention_mask", "decoder_attention_mask")


def masks_of(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Read the padding masks of a batch, which are given by name or by position.

    Args:
        model: The model, for the names of its arguments.
        batch: The batch.

    Returns:
        Name -> boolean mask of the real tokens, (batch, tokens); empty if all tokens are real.

    Raises:
        ValueError: If a mask has another shape, or only one of the masks of an encoder and a
            decoder is given.
    """
    args, kwargs = arguments(batch)
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments if args else {}
    named = {name: given.get(name, kwargs.get(name)) for name in _NAMES}
    masks = {name: mask for name, mask in named.items() if mask is not None}
    if all(isinstance(mask, Tensor) and bool((mask != 0).all()) for mask in masks.values()):
        return {}
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"{name}: got {found}, from which padding cannot be told; pass a tensor of (batch, "
                "tokens), or unpadded batches without it"
            )
    if len(masks) < len(_NAMES) and any(map(_has_two_sequences, model.modules())):
        raise ValueError(
            f"data: got {', '.join(masks)} alone, which leaves open what is padding elsewhere; "
            "pass attention_mask and decoder_attention_mask, or unpadded batches"
        )
    return {name: mask != 0 for name, mask in masks.items()}


def rows_of(site: str, masks: Mapping[str, Tensor], x: Tensor) -> Tensor | None:
    """Find the mask that belongs to the input of a site.

    Args:
        site: The site, for errors.
        masks: The masks of the batch.
        x: The input, shape (..., d_in).

    Returns:
        Boolean mask of the real rows, of the shape of x without its last axis; None if all are.

    Raises:
        ValueError: If padding cannot be told from the shapes.
    """
    rows = tuple(x.shape[:-1])
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    if not masks or any(rows == shape[:1] for shape in shapes.values()):
        return None  # no token is padded, or there is one row for each sequence
    flat = len(rows) == 1 and ".experts." not in f".{site}."
    fitting = [
        mask.to(x.device).reshape(rows)
        for mask in masks.values()
        if rows == mask.shape or (flat and rows[0] == mask.numel())
    ]
    if not fitting or any(not torch.equal(mask, fitting[0]) for mask in fitting):
        raise ValueError(
            f"{site}: which of its rows {rows} are padding cannot be told from {shapes}; pass "
            "unpadded batches, or leave the site out"
        )
    return fitting[0]


def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows of real tokens, shape (n, d)."""
    return x.reshape(-1, x.shape[-1]) if mask is None else x[mask]


def last_rows(site: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """Copy the last real token of each row of the batch.

    Returns:
        Shape (batch, d).

    Raises:
        ValueError: If x is not of shape (batch, tokens, d), or a row has no token.
    """
    if x.ndim != 3:
        raise ValueError(
            f"{site}: its input has shape {tuple(x.shape)}; the last token is defined for (batch, "
            "tokens, d_in); leave the site out"
        )
    if mask is None:
        return x[:, -1].clone()
    if not mask.any(1).all():
        raise ValueError(f"{site}: a row of the batch is all padding and has no last token")
    positions = torch.arange(x.shape[1], device=x.device)
    return x[torch.arange(len(x), device=x.device), (mask * (positions + 1)).argmax(1)]


def _has_two_sequences(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
