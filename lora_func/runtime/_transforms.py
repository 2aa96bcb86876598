"""What torch.func's transforms need around a call of a model, for the length of the call."""

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_func.runtime._patches import Slot


class WhileNeeded:
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
_differentiable_attention = WhileNeeded(lambda: sdpa_kernel(SDPBackend.MATH))
_unpeeked_masks = WhileNeeded(_no_mask_peeking)
_called_attention_parts = WhileNeeded(_no_attention_fast_path)

_FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


def has_fast_path(model: nn.Module) -> bool:
    """Tell whether a model has layers for which torch has a fused inference kernel."""
    return any(isinstance(module, _FUSED) for module in model.modules())


def settings_now(fast_path: bool) -> tuple[WhileNeeded, ...]:
    """Return what the transforms that are active now need.

    Args:
        fast_path: Whether the model has layers with a fused inference kernel.
    """
    settings = []
    if needs_math():
        settings.append(_differentiable_attention)
    if "Vmap" in active_transforms():
        settings.append(_unpeeked_masks)
    if fast_path:
        settings.append(_called_attention_parts)
    return tuple(settings)


@contextmanager
def held(settings: Iterable[WhileNeeded]) -> Iterator[None]:
    """Keep settings in force."""
    with ExitStack() as stack:
        for setting in settings:
            stack.enter_context(setting)
        yield


def needs_math() -> bool:
    """Tell whether a transform is active that fused kernels have no rule for."""
    kinds = active_transforms()
    return "Vmap" in kinds or in_forward_mode() or kinds.count("Grad") > 1


def in_forward_mode() -> bool:
    """Whether a jvp is running, by torch.func or by torch.autograd.forward_ad."""
    return torch.autograd.forward_ad._current_level >= 0


def active_transforms() -> list[str]:
    """The kinds of transforms around this call, outermost first: "Grad", "Vmap", "Jvp"..."""
    stack = torch._C._functorch.get_interpreter_stack()
    return [] if stack is None else [level.key().name for level in stack]


def transformed() -> bool:
    """Whether any transform is active, also while compiling."""
    return bool(active_transforms()) or in_forward_mode()


def autocasts(tensor: Tensor) -> bool:
    """Tell whether autocast chooses the dtypes of products on a tensor's device."""
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def compiled_attention() -> AbstractContextManager[Any]:
    """Return the setting of attention for a region that is being compiled."""
    return sdpa_kernel(SDPBackend.MATH) if needs_math() else nullcontext()


for _constant in (needs_math, transformed):
    # torch.compiler.assume_constant_result, which would import the compiler
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def transformable(model: nn.Module) -> Iterator[Slot]:
    """Say what to write where so that transforms can go through a model.

    Args:
        model: The model. Without transformers' hooks that make the inputs of a checkpointed model
            require grad; its experts, if needed, in the form that has all rules.

    Yields:
        Slots.
    """
    math = needs_math()
    for module in model.modules():
        hooks = {k: hook for k, hook in module._forward_hooks.items() if not _requires_grad(hook)}
        if len(hooks) < len(module._forward_hooks):
            yield vars(module), "_forward_hooks", OrderedDict(hooks)
        config = getattr(module, "config", None)
        if math and getattr(config, _EXPERTS, None) not in (None, "batched_mm"):
            yield vars(config), _EXPERTS, "batched_mm"


_EXPERTS = "_experts_implementation_internal"


def _requires_grad(hook: Callable[..., Any]) -> bool:
    return getattr(hook, "__name__", "") == "make_inputs_require_grads"
