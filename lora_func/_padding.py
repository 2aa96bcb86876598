"""Which rows of a site's input are real tokens, and which are padding."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def mask_for(site: str, model: nn.Module, batch: Any, x: Tensor) -> Tensor | None:
    """Find the padding mask that belongs to the input of a site.

    Args:
        site: The site, for errors.
        model: The model, which may declare that it has an encoder and a decoder.
        batch: The batch; masks are read from a mapping.
        x: The input, shape (..., d_in).

    Returns:
        Which rows are real, boolean, of the shape of x without its last axis; None if all are.

    Raises:
        ValueError: If padding cannot be told from the shapes.
    """
    padded = dict(_padded(site, batch))
    if not padded:
        return None
    rows = x.shape[:-1]
    fitting = {
        name: mask.reshape(rows)
        for name, mask in padded.items()
        if mask.shape == rows or (len(rows) == 1 and mask.numel() == rows[0])
    }
    if len(fitting) > 1 or (fitting and _two_sequences(model, batch)):
        raise ValueError(
            f"{site}: the encoder's and the decoder's tokens have one shape, {tuple(rows)}, which "
            "hides whose padding it is; pad them to different lengths, or not at all"
        )
    of_sequences = any(rows[0] == mask.shape[0] for mask in padded.values()) if rows else False
    if not fitting and len(rows) == 1 and not of_sequences:
        raise ValueError(
            f"{site}: its {rows[0]} rows are neither the tokens nor the sequences of a padded "
            f"batch, {[tuple(mask.shape) for mask in padded.values()]}; pass unpadded batches"
        )
    return next(iter(fitting.values()), None)


def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows of real tokens, shape (n, d)."""
    return x.flatten(0, -2) if mask is None else x[mask]


def last_rows(site: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the last real token of each row of the batch.

    Returns:
        Shape (batch, d).

    Raises:
        ValueError: If x is not of shape (batch, tokens, d).
    """
    if x.ndim != 3:
        raise ValueError(
            f"{site}: its input has shape {tuple(x.shape)}; the last token is defined for (batch, "
            "tokens, d_in); leave the site out"
        )
    if mask is None:
        return x[:, -1]
    positions = torch.arange(x.shape[1], device=x.device)
    last = (mask * (positions + 1)).argmax(1)
    return x[torch.arange(len(x), device=x.device), last]


def _padded(site: str, batch: Any) -> Iterator[tuple[str, Tensor]]:
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(name) if isinstance(batch, Mapping) else None
        if mask is None or bool((mask != 0).all()):
            continue
        if mask.ndim != 2:
            raise ValueError(
                f"{site}: {name} has shape {tuple(mask.shape)}; padding is read from (batch, "
                "tokens)"
            )
        yield name, mask != 0


def _two_sequences(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether another sequence of the same shape runs through the model, its mask unknown."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    masks = [batch.get(name) for name in ("attention_mask", "decoder_attention_mask")]
    shapes = {mask.shape for mask in masks if mask is not None}
    others = [batch.get(name) for name in ("input_ids", "decoder_input_ids", "labels")]
    sequences = [other for other in others if other is not None and other.shape in shapes]
    return len(sequences) > 1
