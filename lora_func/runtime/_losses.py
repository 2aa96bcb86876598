"""Losses over the rows of several adapters, as one loss for each adapter.

A model that computes its own loss still does so, with its own shifts, weights and ignored labels:
while adapters share a call, the losses of ``torch.nn.functional`` split their rows.
"""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple, TypeAlias, cast

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
_ARGUMENTS = {loss: tuple(signature(loss).parameters) for loss in _LOSSES}


class Rows(NamedTuple):
    """Which rows belong to which adapter.

    Attributes:
        sizes: The number of adapters in each stack.
        batch: The number of rows of each adapter.
    """

    sizes: tuple[int, ...]
    batch: int

    @property
    def adapters(self) -> int:
        """The number of adapters."""
        return sum(self.sizes)


class LossPerAdapter(TorchFunctionMode):
    """Splits every loss of ``torch.nn.functional`` into one number for each adapter.

    A loss is split if its rows are a multiple of the rows of all adapters.

    Attributes:
        rows: Which rows belong to which adapter.
        split: The losses that were split, which an output may hold.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        self.split: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _LOSSES:
            return self._split(func, args, kwargs or {})
        if torch.compiler.is_compiling() and func is Tensor.unflatten:
            # the compiler cannot follow the method into its base class
            return torch.unflatten(*args, **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)

    def _split(self, loss: Loss, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        given: dict[str, Any] = {**dict(zip(_ARGUMENTS[loss], args, strict=False)), **kwargs}
        rows, weight = given["input"].shape[:1], cast(Any, given.get("weight"))
        divides = rows and rows[0] % (self.rows.adapters * max(self.rows.batch, 1)) == 0
        if not divides or given["target"].shape[:1] != rows or given.get("reduction") == "none":
            return loss(**given)
        split = ["input", "target"]
        by_row = weight is not None and loss not in _WEIGHTED_BY_CLASS
        if by_row and weight.ndim == given["input"].ndim and weight.shape[:1] == rows:
            split.append("weight")
        share = rows[0] // self.rows.adapters
        # indexing K times would make K gradients of the full size
        pieces = [
            given[name].reshape(self.rows.adapters, share, *given[name].shape[1:]).unbind()
            for name in split
        ]
        each = [
            loss(**{**given, **dict(zip(split, piece, strict=True))})
            for piece in zip(*pieces, strict=True)
        ]
        together = torch.stack(each)
        self.split.append(together)
        return together


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
