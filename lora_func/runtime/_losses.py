"""Losses over the rows of several adapters, as one loss for each adapter.

A model that computes its own loss still does so, with its own shifts, weights and ignored labels:
while adapters share a call, the losses of ``torch.nn.functional`` split their rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Loss: TypeAlias = Callable[..., Tensor]

_WEIGHTED_BY_CLASS: tuple[Loss, ...] = (F.cross_entropy, F.nll_loss)
_LOSSES: frozenset[Loss] = frozenset(
    {
        *_WEIGHTED_BY_CLASS,
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.huber_loss,
        F.kl_div,
        F.l1_loss,
        F.mse_loss,
        F.multilabel_soft_margin_loss,
        F.smooth_l1_loss,
        F.soft_margin_loss,
    }
)


class LossPerAdapter(TorchFunctionMode):
    """Splits every loss of ``torch.nn.functional`` into one number for each adapter.

    Attributes:
        adapters: The number of adapters.
        split: The losses that were split, which an output may hold.
    """

    def __init__(self, adapters: int) -> None:
        super().__init__()
        self.adapters = adapters
        self.split: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOSSES:
            return self._split(func, args, kwargs)
        if func is Tensor.unflatten:  # the compiler cannot follow it into its base class
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)

    def _split(self, loss: Loss, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        settings = dict(kwargs)
        given = [*args[:2], *(settings.pop(name) for name in ("input", "target")[len(args) :])]
        rows, rest = given[0].shape[:1], [*args[2:]]
        divides = rows and rows[0] % self.adapters == 0 and given[1].shape[:1] == rows
        if not divides or kwargs.get("reduction") == "none":
            return loss(*args, **kwargs)
        weight = rest[0] if rest else settings.pop("weight", None)
        by_row = loss not in _WEIGHTED_BY_CLASS and isinstance(weight, Tensor)
        if by_row and weight.shape[:1] == rows:
            given, rest = [*given, weight], rest[1:]
        elif not rest and weight is not None:
            settings["weight"] = weight
        share = rows[0] // self.adapters
        # indexing K times would make K gradients of the full size
        pieces = [value.reshape(self.adapters, share, *value.shape[1:]).unbind() for value in given]
        each = [loss(*piece, *rest, **settings) for piece in zip(*pieces, strict=True)]
        split = torch.stack(each)
        self.split.append(split)
        return split
