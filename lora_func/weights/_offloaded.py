"""Weights that accelerate's hooks keep elsewhere while their module does not run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_func.compat import HF_HOOK
from lora_func.modules import original_parameters


def _offloading_hook(module: nn.Module) -> Any:
    """The hook that loads a module's weights for its forward, and only for that; or None."""
    hook = vars(module).get(HF_HOOK)
    hooks = getattr(hook, "hooks", (hook,))
    return next((one for one in hooks if getattr(one, "offload", False)), None)


def is_offloaded(module: nn.Module) -> bool:
    """True if some of a module's own weights are not in memory now, and accelerate loads them."""
    own = original_parameters(module).values()
    absent = any(tensor is not None and tensor.is_meta for tensor in own)
    return absent and _offloading_hook(module) is not None


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Have a module's own weights in memory for a while, wherever accelerate keeps them."""
    if not is_offloaded(module):
        yield
        return
    hook = _offloading_hook(module)
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def device_of_module(module: nn.Module, name: str = "weight") -> torch.device:
    """Return the device on which a module computes with one of its parameters."""
    if is_offloaded(module):
        return torch.device(_offloading_hook(module).execution_device)
    own = original_parameters(module).get(name)
    device: torch.device = (getattr(module, name) if own is None else own).device
    return device
