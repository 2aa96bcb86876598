"""What torch.func's transforms need around a call of a model, while the call runs."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_func.compat import (
    CACHED_WEIGHTS,
    EXPERTS_SETTING,
    HOOKS,
    active_transforms,
    buffers_of,
    forward_hooks_of,
    is_wrapped,
    makes_inputs_require_grad,
    masking_module,
    needs_math,
)
from lora_func.runtime._patches import Patch, RefCountedSetting

_CUDA: Any = torch.backends.cuda


def _kernels() -> tuple[bool, ...]:
    return (
        _CUDA.flash_sdp_enabled(),
        _CUDA.mem_efficient_sdp_enabled(),
        _CUDA.cudnn_sdp_enabled(),
        _CUDA.math_sdp_enabled(),
    )


def _set_kernels(enabled: tuple[bool, ...]) -> None:
    flash, efficient, cudnn, math = enabled
    _CUDA.enable_math_sdp(math)
    _CUDA.enable_flash_sdp(flash)
    _CUDA.enable_mem_efficient_sdp(efficient)
    _CUDA.enable_cudnn_sdp(cudnn)


def _mask_check() -> Any:
    return getattr(masking_module(), "is_tracing", None)


def _set_mask_check(function: Any) -> None:
    masking = masking_module()
    if masking is not None and function is not None:
        masking.is_tracing = function


# fused attention has no batching rule for its backward, no forward mode, no second derivative
_ONLY_MATH: tuple[bool, ...] = (False, False, False, True)
_math_attention = RefCountedSetting(_kernels, _set_kernels, _ONLY_MATH)

# transformers looks into a padding mask for a shortcut, which vmap cannot do
_unread_masks = RefCountedSetting(_mask_check, _set_mask_check, lambda _=None: True)

# torch's transformer layers have a fused kernel that reads the weights of their parts
_called_attention = RefCountedSetting(
    torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False
)

_FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


def has_fast_path(model: nn.Module) -> bool:
    """True if a model has layers for which torch has a fused inference kernel."""
    return any(isinstance(module, _FUSED) for module in model.modules())


def settings_now(fast_path: bool) -> Iterator[Patch]:
    """Yield the settings that the active transforms need.

    Args:
        fast_path: Whether the model has layers with a fused inference kernel.

    Yields:
        Patches that hold the settings.
    """
    token = object()
    if needs_math():
        yield _math_attention, token, True
    if "Vmap" in active_transforms():
        yield unread_masks()
    if fast_path:
        yield _called_attention, token, True


def unread_masks() -> Patch:
    """Return the patch during which transformers does not look into padding masks."""
    return _unread_masks, object(), True


def compiled_attention() -> AbstractContextManager[Any]:
    """Return the setting of attention for a region that is being compiled."""
    return sdpa_kernel(SDPBackend.MATH) if needs_math() else nullcontext()


def transformable(model: nn.Module) -> Iterator[Patch]:
    """Yield patches with which transforms can run a model, and leave it as it was.

    They remove transformers' hooks that make the inputs of a checkpointed model require grad,
    choose the implementation of experts that has all rules, and discard buffers and other tensors
    that the model assigns: those belong to the transform and die with it.

    Args:
        model: The model.

    Yields:
        Patches.
    """
    math = needs_math()
    for module in model.modules():
        hooks = forward_hooks_of(module)
        kept = {k: hook for k, hook in hooks.items() if not makes_inputs_require_grad(hook)}
        if len(kept) < len(hooks):
            yield vars(module), HOOKS, OrderedDict(kept)
        config = getattr(module, "config", None)
        if math and getattr(config, EXPERTS_SETTING, None) not in (None, "batched_mm"):
            yield vars(config), EXPERTS_SETTING, "batched_mm"
        yield _AssignedTensors(), module, None


class _AssignedTensors:
    """The place of a patch that restores the tensors which a module's attributes held."""

    def __init__(self) -> None:
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def get(self, module: nn.Module, default: Any) -> Any:
        return default

    def __setitem__(self, module: nn.Module, value: None) -> None:
        for place in (buffers_of(module), vars(module)):
            tensors = {name: t for name, t in place.items() if isinstance(t, Tensor)}
            self._before.append((place, tensors))

    def pop(self, module: nn.Module, default: Any) -> Any:
        for place, tensors in self._before:
            for name, found in [*place.items()]:
                if isinstance(found, Tensor) and is_wrapped(found):
                    if name in tensors:
                        place[name] = tensors[name]
                    else:
                        del place[name]
        return default


def cached_weights(module: nn.Module) -> Iterator[Patch]:
    """Yield patches that restore the tensors which a recurrent layer remembers from its last call.

    Args:
        module: The layer.

    Yields:
        Patches.
    """
    own = vars(module)
    yield from ((own, name, own[name]) for name in CACHED_WEIGHTS if name in own)
