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

from lora_func.compat import current_mode, pop_mode, push_mode

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
_UNFLATTEN: Any = Tensor.unflatten
_SPECIAL = _LOSSES | {_UNFLATTEN}


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
        if func in _SPECIAL:
            if func is _UNFLATTEN:  # the compiler cannot follow it into its base class
                return torch.unflatten(*args, **(kwargs or {}))
            return self._split(func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)

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


class PausedMode:
    """A context in which one torch function mode sees no operations; other modes still do.

    Nothing happens if the mode is not the innermost one.
    """

    __slots__ = ("mode", "paused")

    def __init__(self, mode: TorchFunctionMode | None) -> None:
        self.mode = mode
        self.paused = False

    def __enter__(self) -> None:
        if self.mode is not None and current_mode() is self.mode:
            pop_mode()
            self.paused = True

    def __exit__(self, *exc: object) -> None:
        if self.paused:
            push_mode(self.mode)
