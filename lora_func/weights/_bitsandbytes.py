"""Which modules and parameters bitsandbytes has quantised, recognised by the names of types."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.compat import BITSANDBYTES_LAYERS, BITSANDBYTES_STATES, REPACKED_FOR_CPU
from lora_func.weights._packed import Packed, Packed4, Packed8


def is_quantised(module: nn.Module) -> bool:
    """True for a quantised linear layer of bitsandbytes."""
    return type(module) is not nn.Linear and _kind(module) is not None


def is_packed(parameter: Tensor) -> bool:
    """True for a parameter that holds codes of bitsandbytes, now or after its quantisation."""
    return type(parameter).__module__ == BITSANDBYTES_LAYERS[0]


def numel_of(parameter: Tensor) -> int:
    """Count the numbers that a parameter stands for; codes of 4 bits lie two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def is_quantised_state(value: object) -> bool:
    """True for an attribute of a module that belongs to its quantised weight."""
    return type(value).__name__ in BITSANDBYTES_STATES


def mixes_rows(module: nn.Module, path: str) -> bool:
    """True if one row of a layer's input changes the output of another row."""
    return is_quantised(module) and packed(module, path).mixes_rows


class _Rounding(threading.local):
    wanted = True


_rounding = _Rounding()


@contextmanager
def without_rounding() -> Iterator[None]:
    """Let 8-bit layers take their inputs without rounding, in this thread."""
    _rounding.wanted = False
    try:
        yield
    finally:
        _rounding.wanted = True


def packed(module: nn.Module, path: str) -> Packed:
    """Read the weight of a quantised linear layer, without a copy.

    Args:
        module: A module that ``is_quantised`` accepts.
        path: Its path, for messages.

    Returns:
        The weight, as the layer computes with it in its current mode.

    Raises:
        ValueError: If the weight is not quantised yet, or is repacked for inference.
        TypeError: If the layer keeps its weight in floating point.
    """
    layer: Any = module
    if _kind(module) == "Linear4bit":
        return _packed4(layer, path)
    state = layer.state
    if state.has_fp16_weights:
        raise TypeError(
            f"{path}: a Linear8bitLt with has_fp16_weights=True quantises a weight that it trains; "
            "accepted is has_fp16_weights=False"
        )
    # bitsandbytes moves the codes there when the layer first runs
    holder = state if layer.weight.CB is None else layer.weight
    if holder.CB is None or holder.SCB is None or holder.CB.dtype != torch.int8:
        raise ValueError(f"{path}: {_NOT_YET}")
    codes, scales = holder.CB, holder.SCB
    if not torch.compiler.is_compiling() and codes.device != layer.weight.device:
        # when a model moves, bitsandbytes moves the parameter's data alone
        codes, scales = layer.weight.data, scales.to(layer.weight.device)
    like_cpu = codes.device.type in ("cpu", "xpu")
    rounds = _rounding.wanted and not (like_cpu and layer.training)
    return Packed8(codes, scales, state.threshold, rounds)


def _packed4(layer: Any, path: str) -> Packed4:
    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    if state is None:
        raise ValueError(f"{path}: {_NOT_YET}")
    if getattr(state, REPACKED_FOR_CPU, False):
        raise ValueError(
            f"{path}: bitsandbytes has repacked this weight for inference on this processor, and "
            "rounded it; load the model again, and run it through lora_func from the start"
        )
    return Packed4(layer.weight, state, layer.compute_dtype)


_NOT_YET = "its weight is not quantised yet; load the model, or move it with .to(device)"


def is_unknown_quantised(module: nn.Module) -> bool:
    """True for a subclass of a quantised layer with a forward of its own."""
    return _base(module) is not None and _kind(module) is None


def _kind(module: nn.Module) -> str | None:
    found = _base(module)
    if found is None or type(module).forward is not getattr(found, "forward", None):
        return None
    return found.__name__


def _base(module: nn.Module) -> type | None:
    package, names = BITSANDBYTES_LAYERS
    for found in type(module).__mro__:
        if found.__module__ == package and found.__name__ in names:
            return found
    return None
