"""How bitsandbytes stores 4-bit and 8-bit weights.

bitsandbytes is not imported: whoever has such a layer has imported it.
"""

import sys
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


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
        rounds: Whether inputs are rounded.
    """

    codes: Tensor
    scales: Tensor
    threshold: float
    rounds: bool
    compute_dtype = None
    kind = "int8"
    dtype = torch.float32

    @property
    def mixes_rows(self) -> bool:
        """Whether a row of the input has a part in what others give."""
        return self.rounds and self.threshold > 0

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
        if not self.rounds:
            return F.linear(x, self.dense(x.dtype), bias)
        bitsandbytes: Any = sys.modules["bitsandbytes"]
        state = bitsandbytes.MatmulLtState()
        state.CB, state.SCB, state.threshold = self.codes, self.scales, self.threshold
        state.is_training, state.has_fp16_weights = False, False
        rows = x.reshape(-1, x.shape[-1])
        if self.threshold and x.dtype == torch.float16:
            rows = rows.clone()  # on a CPU its kernel writes into them for a while
        y: Tensor = bitsandbytes.matmul(rows, self.codes, state=state, bias=bias)
        return y.reshape(*x.shape[:-1], -1)


Packed: TypeAlias = Packed4 | Packed8
