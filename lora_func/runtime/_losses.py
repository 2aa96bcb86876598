"""Losses over the rows of all adapters, as one for each of them.

A model that computes its own loss goes on to do so, with its own shifts, weights and ignored
labels: while a call is folded, the losses of ``torch.nn.functional`` split their rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lora_func.runtime._patches import Put, Slot
from lora_func.runtime._running import runs_here
from lora_func.runtime._selection import refuse_selected
from lora_func.runtime._transforms import WhileNeeded

Loss: TypeAlias = Callable[..., Tensor]

_MARK = "_lora_func_split"
_WEIGHTED_BY_CLASS: tuple[Loss, ...] = (F.cross_entropy, F.nll_loss)
_LOSSES: tuple[Loss, ...] = (
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
)


def _split(loss: Loss, adapters: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    settings = dict(kwargs)
    given = [*args[:2], *(settings.pop(name) for name in ("input", "target")[len(args) :])]
    rows, rest = given[0].shape[:1], [*args[2:]]
    refuse_selected(loss.__name__, given)
    apart = rows and rows[0] % adapters == 0 and given[1].shape[:1] == rows
    if not apart or kwargs.get("reduction") == "none":
        return loss(*args, **kwargs)
    weight = rest[0] if rest else settings.pop("weight", None)
    by_row = loss not in _WEIGHTED_BY_CLASS and isinstance(weight, Tensor)
    if by_row and weight.shape[:1] == rows:
        given, rest = [*given, weight], rest[1:]
    elif not rest and weight is not None:
        settings["weight"] = weight
    share = rows[0] // adapters
    # indexing K times would give K gradients of the size of all
    pieces = [value.reshape(adapters, share, *value.shape[1:]).unbind() for value in given]
    each = [loss(*piece, *rest, **settings) for piece in zip(*pieces, strict=True)]
    split = torch.stack(each)
    if not torch.compiler.is_compiling():
        setattr(split, _MARK, True)
    return split


def is_split(tensor: Tensor) -> bool:
    """Tell whether a tensor is a loss that was split: one number for each adapter."""
    return hasattr(tensor, _MARK)


def _wrapped(loss: Loss) -> Loss:
    @wraps(loss)
    def split(*args: Any, **kwargs: Any) -> Tensor:
        runs = runs_here()
        rows = runs[-1].work.rows if runs and runs[-1].work else None
        return loss(*args, **kwargs) if rows is None else _split(loss, rows.adapters, args, kwargs)

    return split


def _slots() -> Iterator[Slot]:
    yield from ((vars(F), loss.__name__, _wrapped(loss)) for loss in _LOSSES)


losses_apart = WhileNeeded(lambda: Put(_slots()))
"""The setting in which the losses of a folded call are one for each adapter."""


class CompiledLossesApart(TorchFunctionMode):
    """The same for the compiler, which sees no change of ``torch.nn.functional``.

    Without it the mode would cost more than the losses: it looks at every operation.
    """

    def __init__(self, adapters: int) -> None:
        super().__init__()
        self.adapters = adapters

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(func is loss for loss in _LOSSES):
            return _split(func, self.adapters, args, kwargs)
        if func is Tensor.unflatten:  # which the compiler cannot follow into its base class
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)
