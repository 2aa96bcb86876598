"""Trainable tokens: a few rows of an embedding, and of the output head that is tied to it.

    E'[ids] = E[ids] + Δ,   Δ (n, d)

*Identity at the start because* Δ = 0, which is added.

Asks of W: ``linear`` only. Memory and gradients have the size of Δ; the table is never copied. In a
head the logits of the chosen tokens change.

References:
    huggingface/peft ``tuners/trainable_tokens/layer.py``.

Deviations: PEFT stores the new rows, here their difference from the old ones is trained: the result
of a step is the same, weight decay pulls to the old row. PEFT lets the last of equal ids win; they
are refused. A row at ``padding_idx`` never changes in an embedding, as in torch; in a tied head its
logit does. The learning rate is that of a full fine-tuning of embeddings or higher.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lora_func.checks import check_flag
from lora_func.configs import LinearConfig, Patterns
from lora_func.variant import PeftFormat, Variant
from lora_func.weights import Weight, dense, linear, looks_up


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(LinearConfig):
    """Train the rows of some tokens.

    Attributes:
        token_ids: The rows of the table; of a head the outputs.
        target_modules: As for other configs; it must name embeddings, and possibly heads.
        tied: Whether all named modules share one Δ: for an embedding and the head that is tied to
            it, both of which target_modules then names.

    Examples:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4))
        >>> cfg = lf.TrainableTokens(token_ids=[2, 7], target_modules="0")
        >>> {key: tuple(leaf.shape) for key, leaf in lf.init(model, cfg).items()}
        {'0.trainable_tokens.rows': (2, 4), '0.trainable_tokens._inputs': (2,)}
    """

    token_ids: Sequence[int] = ()
    target_modules: Patterns = ()
    tied: bool = False

    def __post_init__(self) -> None:
        ids = self.token_ids
        if not isinstance(ids, Sequence):
            raise TypeError(f"token_ids: got {type(ids).__name__}, expected a list of integers")
        whole = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)
        if not ids or not whole or len({*ids}) < len(ids):
            raise ValueError(f"token_ids: got {ids!r}, expected different integers of at least 0")
        if not self.target_modules and not self.target_parameters:
            raise ValueError('target_modules: got no pattern; name the embedding: "embed_tokens"')
        check_flag("tied", self.tied)
        super().__post_init__()


def _ids(W: Weight, cfg: TrainableTokens) -> tuple[str, int]:
    """The leaf that holds the ids, and the width of a row; refuses ids that W does not have."""
    d_out, d_in = W.shape
    leaf, tokens, width = ("_inputs", d_in, d_out) if looks_up(W) else ("_outputs", d_out, d_in)
    if max(cfg.token_ids) >= tokens:
        raise ValueError(
            f"token_ids: {max(cfg.token_ids)} is none of the {tokens} tokens of this layer; call "
            "resize_token_embeddings for new tokens first"
        )
    return leaf, width


def shared(
    weights: Mapping[str, Weight], cfg: TrainableTokens, generator: Generator
) -> dict[str, Tensor]:
    """Make the rows of tied modules.

    Returns:
        rows (n, d), if the modules are tied.

    Raises:
        ValueError: If their rows have different widths.
    """
    if not cfg.tied:
        return {}
    widths = {site: _ids(W, cfg)[1] for site, W in weights.items()}
    if len({*widths.values()}) > 1:
        raise ValueError(f"tied: the rows of the named modules have different widths, {widths}")
    return {"rows": torch.zeros(len(cfg.token_ids), next(iter(widths.values())))}


def init(
    W: Weight, cfg: TrainableTokens, generator: Generator, stats: None = None
) -> dict[str, Tensor]:
    """Start at the rows of the base.

    Returns:
        rows (n, d), unless they are shared; _inputs (n,) of an embedding, _outputs (n,) of a head.
    """
    leaf, width = _ids(W, cfg)
    own = {} if cfg.tied else {"rows": torch.zeros(len(cfg.token_ids), width)}
    return {**own, leaf: torch.tensor(cfg.token_ids)}


def apply(W: Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Add Δ to the rows that are looked up, or its products with x to the chosen outputs.

    Returns:
        Shape (..., d_out).
    """
    y = linear(x, W)
    rows = params["rows"].to(y.dtype)
    if "_outputs" in params:
        added, ids = (x @ rows.mT).to(y.dtype), params["_outputs"].long()
        ids = ids if ids.ndim == 1 else ids.unsqueeze(1)  # of a stack (K, 1, n)
        return y.scatter_add(-1, ids.expand_as(added), added)
    ids = params["_inputs"].long()
    places = torch.arange(1, len(ids) + 1, dtype=torch.float64, device=ids.device)
    place = torch.zeros(W.shape[1], dtype=torch.float64, device=ids.device)
    place = place.index_add(0, ids, places)  # 0 for any other token
    found = (x @ place[:, None]).squeeze(-1).long()
    return y + F.embedding(found, torch.cat([torch.zeros_like(rows[:1]), rows]))


def weight(W: Weight, params: Mapping[str, Tensor]) -> Tensor:
    """Compute ``E'``, in the layout of W.

    Returns:
        Shape (d_out, d_in).
    """
    W = dense(W)
    rows, none = params["rows"].to(W.dtype), torch.zeros_like(W)  # in the layout of W
    if "_outputs" in params:
        return W + none.index_add(0, params["_outputs"].long(), rows)
    return W + none.index_add(1, params["_inputs"].long(), rows.mT)


def delta_norm(params: Mapping[str, Tensor], shape: tuple[int, int] | None) -> Tensor:
    """Compute the norm of Δ.

    Returns:
        Shape ().
    """
    norm: Tensor = torch.linalg.matrix_norm(params["rows"].double())
    return norm


VARIANT = Variant(
    name="trainable_tokens",
    config=TrainableTokens,
    family="sparse",
    init=init,
    apply=apply,
    weight=weight,
    shared=shared,
    delta_norm=delta_norm,
    leaves={"rows": "n width", "_inputs?": "n", "_outputs?": "n"},
    neutral={"rows": 0.0},
    peft=(
        PeftFormat(
            "TRAINABLE_TOKENS",
            leaves={},
            ignored=("token_indices", "init_weights", "target_modules"),
            layers=("Embedding",),
        ),
    ),
    stacks=True,
    products_only=True,
)
