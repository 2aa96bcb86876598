"""Which modules and parameters are quantised by bitsandbytes, told by the names of types."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.weights._packed import Packed, Packed4, Packed8


def is_quantised(module: nn.Module) -> bool:
    """Tell whether a module is a quantised linear layer of bitsandbytes."""
    return type(module) is not nn.Linear and _kind(module) is not None


def is_packed(parameter: Tensor) -> bool:
    """Tell whether a parameter holds codes of bitsandbytes, or will, and no numbers."""
    return type(parameter).__module__ == _MODULE


def size_of(parameter: Tensor) -> int:
    """Count the numbers that a parameter stands for."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def is_state(value: object) -> bool:
    """Tell whether an attribute of a module holds what belongs to its quantised weight."""
    return type(value).__name__ in ("QuantState", "MatmulLtState")


def mixes_rows(module: nn.Module, path: str) -> bool:
    """Tell whether a row of a layer's input has a part in what others give."""
    return is_quantised(module) and packed(module, path).mixes_rows


class _Rounding(threading.local):
    wanted = True


_rounding = _Rounding()


@contextmanager
def unrounded() -> Iterator[None]:
    """Let 8-bit layers take their inputs as they are, in this thread."""
    _rounding.wanted = False
    try:
        yield
    finally:
        _rounding.wanted = True


def packed(module: nn.Module, path: str) -> Packed:
    """Read the weight of a quantised linear layer; no copy is made.

    Args:
        module: A module that ``is_quantised`` accepts.
        path: Its path, for messages.

    Returns:
        The weight, as the layer computes with it in the mode that it is in.

    Raises:
        ValueError: If its weight is not quantised yet, or in a layout for inference alone.
        TypeError: If it keeps its weight in floating point.
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
    # bitsandbytes moves them when the layer first runs
    holder = state if layer.weight.CB is None else layer.weight
    if holder.CB is None or holder.SCB is None or holder.CB.dtype != torch.int8:
        raise ValueError(f"{path}: {_NOT_YET}")
    like_cpu = holder.CB.device.type in ("cpu", "xpu")
    rounds = _rounding.wanted and not (like_cpu and layer.training)
    return Packed8(holder.CB, holder.SCB, state.threshold, rounds)


def _packed4(layer: Any, path: str) -> Packed4:
    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    if state is None:
        raise ValueError(f"{path}: {_NOT_YET}")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"{path}: bitsandbytes has repacked this weight for inference on this processor, and "
            "rounded it; load the model again, and run it through lora_func from the start"
        )
    return Packed4(layer.weight, state, layer.compute_dtype)


_NOT_YET = "its weight is not quantised yet; load the model, or move it with .to(device)"


def is_opaque(module: nn.Module) -> bool:
    """Tell whether a module derives from a quantised layer and computes something else."""
    return _base(module) is not None and _kind(module) is None


def _kind(module: nn.Module) -> str | None:
    found = _base(module)
    if found is None or type(module).forward is not getattr(found, "forward", None):
        return None
    return found.__name__


def _base(module: nn.Module) -> type | None:
    # by name, so that bitsandbytes stays unimported
    for found in type(module).__mro__:
        if found.__module__ == _MODULE and found.__name__ in _LAYERS:
            return found
    return None


_MODULE = "bitsandbytes.nn.modules"
_LAYERS = ("Linear4bit", "Linear8bitLt")
