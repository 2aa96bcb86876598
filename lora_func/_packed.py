"""How bitsandbytes stores 4-bit and 8-bit weights.

bitsandbytes is not imported: whoever has such a layer has imported it.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Packed4:
    """A weight of 4 bits, as ``bitsandbytes.nn.Linear4bit`` stores it.

    Attributes:
        codes: Two in a byte.
        state: bitsandbytes' ``QuantState``: shape, scales, kind of code.
        compute_dtype: What the layer computes in; None for the dtype of what it is called with.
    """

    codes: Tensor
    state: Any
    compute_dtype: torch.dtype | None
    mixes_rows = False

    @property
    def shape(self) -> torch.Size:
        """(d_out, d_in)."""
        return torch.Size(self.state.shape)

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in; of unknown dtype what the weight was quantised from."""
        dtype: torch.dtype = self.compute_dtype or self.state.dtype
        return dtype

    @property
    def kind(self) -> str:
        """The kind of code."""
        kind: str = self.state.quant_type
        return kind

    @property
    def eps(self) -> float:
        """How coarse the numbers are that the layer computes with."""
        return torch.finfo(self.dtype).eps

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.codes.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Dequantise.

        Returns:
            Shape (d_out, d_in).
        """
        functional: Any = sys.modules["bitsandbytes.functional"]
        found = self.state
        state = functional.QuantState(
            found.absmax,
            shape=found.shape,
            code=found.code,
            blocksize=found.blocksize,
            quant_type=found.quant_type,
            dtype=dtype,
            offset=found.offset,
            state2=found.state2,
        )
        dequantised: Tensor = functional.dequantize_4bit(self.codes.view(-1, 1), state)
        return dequantised

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute ``x Wᵀ + b`` as bitsandbytes does, without derivatives.

        Returns:
            Shape (..., d_out).
        """
        bitsandbytes: Any = sys.modules["bitsandbytes"]
        y: Tensor = bitsandbytes.matmul_4bit(x, self.codes, self.state, bias=bias)
        return y


@dataclass(frozen=True, eq=False)
class Packed8:
    """A weight of 8 bits, as ``bitsandbytes.nn.Linear8bitLt`` stores it.

    The layer rounds what it is called with to 8 bits as well, but for the columns in which a value
    is above a threshold (LLM.int8); in training mode on a CPU it does not. Derivatives pass that
    rounding by, as in bitsandbytes.

    Attributes:
        codes: int8, shape (d_out, d_in).
        scales: float32, shape (d_out,), of the largest code, 127.
        threshold: Above which a column of inputs is not rounded; 0 for none.
        training: Whether the layer is in training mode.
    """

    codes: Tensor
    scales: Tensor
    threshold: float
    training: bool
    compute_dtype = None
    kind = "int8"
    dtype = torch.float32
    eps = 1 / 127

    @property
    def mixes_rows(self) -> bool:
        """Whether a row of the input has a part in what others give."""
        return self.threshold > 0 and not (self.training and self.device.type in ("cpu", "xpu"))

    @property
    def shape(self) -> torch.Size:
        """(d_out, d_in)."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where the weight lies."""
        return self.codes.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Dequantise.

        Returns:
            Shape (d_out, d_in).
        """
        return self.codes.to(dtype).mul_(self.scales[:, None] * (1 / 127))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute ``x Wᵀ + b`` as bitsandbytes does, without derivatives.

        Returns:
            Shape (..., d_out).
        """
        bitsandbytes: Any = sys.modules["bitsandbytes"]
        state = bitsandbytes.MatmulLtState()
        state.CB, state.SCB, state.threshold = self.codes, self.scales, self.threshold
        state.is_training, state.has_fp16_weights = self.training, False
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = bitsandbytes.matmul(rows, self.codes, state=state, bias=bias)
        return y.reshape(*x.shape[:-1], -1)


Packed: TypeAlias = Packed4 | Packed8


def is_quantised(module: nn.Module) -> bool:
    """Tell whether a module is a quantised linear layer of bitsandbytes."""
    return _kind(module) is not None


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


def mixes_rows(module: nn.Module) -> bool:
    """Tell whether a row of a layer's input has a part in what others give."""
    return is_quantised(module) and packed(module).mixes_rows


def packed(module: nn.Module) -> Packed:
    """Read the weight of a quantised linear layer; no copy is made.

    Args:
        module: A module that ``is_quantised`` accepts.

    Returns:
        The weight, as the layer computes with it in the mode that it is in.

    Raises:
        ValueError: If its weight is not quantised yet, or in a layout for inference alone.
        TypeError: If it keeps its weight in floating point.
    """
    layer: Any = module
    if _kind(module) == "Linear4bit":
        return _packed4(layer)
    state = layer.state
    if state.has_fp16_weights:
        raise TypeError(
            "a Linear8bitLt with has_fp16_weights=True quantises a weight that it trains; accepted "
            "is has_fp16_weights=False"
        )
    # bitsandbytes moves them when the layer first runs
    holder = state if layer.weight.CB is None else layer.weight
    if holder.CB is None or holder.SCB is None or holder.CB.dtype != torch.int8:
        raise ValueError(_NOT_YET)
    return Packed8(holder.CB, holder.SCB, state.threshold, layer.training)


def _packed4(layer: Any) -> Packed4:
    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    if state is None:
        raise ValueError(_NOT_YET)
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has repacked this weight for inference on this processor, and rounded "
            "it; load the model again, and run it through lora_func from the start"
        )
    return Packed4(layer.weight, state, layer.compute_dtype)


_NOT_YET = "its weight is not quantised yet; load the model, or move it with .to(device)"


def _kind(module: nn.Module) -> str | None:
    # by name, so that bitsandbytes stays unimported
    for found in type(module).__mro__:
        if found.__module__ == _MODULE and found.__name__ in _LAYERS:
            plain = type(module).forward is getattr(found, "forward", None)
            return found.__name__ if plain else None
    return None


_MODULE = "bitsandbytes.nn.modules"
_LAYERS = ("Linear4bit", "Linear8bitLt")
