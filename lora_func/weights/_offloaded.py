"""Weights that are elsewhere while their module does not run: accelerate's hooks, ZeRO-3."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_func.modules import is_partitioned, offloading_hook, original_parameters


def is_offloaded(module: nn.Module) -> bool:
    """True if some of a module's own weights are not in memory now, and accelerate loads them."""
    own = original_parameters(module).values()
    absent = any(tensor is not None and tensor.is_meta for tensor in own)
    return absent and offloading_hook(module) is not None


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Have a module's own weights in memory for a while, wherever they are kept.

    DeepSpeed's ZeRO-3 gathers them from all ranks, which must do this together.
    """
    parts = [p for p in original_parameters(module).values() if is_partitioned(p)]
    if parts:
        deepspeed: Any = sys.modules["deepspeed"]
        with deepspeed.zero.GatheredParameters(parts):
            yield
        return
    if not is_offloaded(module):
        yield
        return
    hook = offloading_hook(module)
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def device_of_module(module: nn.Module, name: str = "weight") -> torch.device:
    """Return the device on which a module computes with one of its parameters."""
    if is_offloaded(module):
        return torch.device(offloading_hook(module).execution_device)
    own = original_parameters(module).get(name)
    device: torch.device = (getattr(module, name) if own is None else own).device
    return device
