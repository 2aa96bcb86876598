"""What torch.func's transforms need around a call of a model, for the length of the call."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class _WhileNeeded:
    """A process-wide setting, in force while a call needs it; calls of threads may overlap."""

    def __init__(self, setting: Callable[[], AbstractContextManager[Any]]) -> None:
        self._setting = setting
        self._lock = threading.Lock()
        self._calls = 0
        self._held = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._calls == 0:
                self._held.enter_context(self._setting())
            self._calls += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._calls -= 1
            if self._calls == 0:
                self._held.close()


@contextmanager
def _no_mask_peeking() -> Iterator[None]:
    """Keep transformers from looking into a padding mask for a shortcut, which vmap cannot do."""
    masking: Any = sys.modules.get("transformers.masking_utils")
    if masking is None:
        yield
        return
    found = masking.is_tracing
    masking.is_tracing = lambda _=None: True
    try:
        yield
    finally:
        masking.is_tracing = found


@contextmanager
def _no_attention_fast_path() -> Iterator[None]:
    """Make torch's transformer layers call their parts, whose weights a fused kernel reads past."""
    found = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(found)


# fused attention has no batching rule for its backward, no forward mode, no second derivative
_differentiable_attention = _WhileNeeded(lambda: sdpa_kernel(SDPBackend.MATH))
_unpeeked_masks = _WhileNeeded(_no_mask_peeking)
_called_attention_parts = _WhileNeeded(_no_attention_fast_path)

_FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


def has_fast_path(model: nn.Module) -> bool:
    """Tell whether a model has layers for which torch has a fused inference kernel."""
    return any(isinstance(module, _FUSED) for module in model.modules())


@contextmanager
def environment(fast_path: bool) -> Iterator[None]:
    """Hold what the transforms that are active now need.

    Args:
        fast_path: Whether the model has layers with a fused inference kernel.
    """
    kinds = _active_transforms()
    vmapped = "Vmap" in kinds
    with ExitStack() as held:
        if vmapped or _in_forward_mode() or kinds.count("Grad") > 1:
            held.enter_context(_differentiable_attention)
        if vmapped:
            held.enter_context(_unpeeked_masks)
        if fast_path:
            held.enter_context(_called_attention_parts)
        yield


def _in_forward_mode() -> bool:
    """Whether a jvp is running, by torch.func or by torch.autograd.forward_ad."""
    return torch.autograd.forward_ad._current_level >= 0


def _active_transforms() -> list[str]:
    """The kinds of transforms around this call, outermost first: "Grad", "Vmap", "Jvp"..."""
    stack = torch._C._functorch.get_interpreter_stack()
    return [] if stack is None else [level.key().name for level in stack]
