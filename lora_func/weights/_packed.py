"""How bitsandbytes stores 4-bit and 8-bit weights.

bitsandbytes is not imported here: a model with such a layer has imported it.
"""

import sys
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packed4:
    """A 4-bit weight, as ``bitsandbytes.nn.Linear4bit`` stores it.

    Attributes:
        codes: Two codes in each byte.
        state: bitsandbytes' ``QuantState``: shape, scales, kind of code.
        compute_dtype: The dtype of the product; None for the dtype of the input.
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
        """The dtype of the product; the dtype before quantisation if that is unknown."""
        dtype: torch.dtype = self.compute_dtype or self.state.dtype
        return dtype

    @property
    def kind(self) -> str:
        """The kind of code."""
        kind: str = self.state.quant_type
        return kind

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
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
        """Compute ``x Wᵀ + b`` by bitsandbytes' kernel, without derivatives.

        Returns:
            Shape (..., d_out).
        """
        bitsandbytes: Any = sys.modules["bitsandbytes"]
        y: Tensor = bitsandbytes.matmul_4bit(x, self.codes, self.state, bias=bias)
        return y


@dataclass(frozen=True, eq=False)
class Packed8:
    """An 8-bit weight, as ``bitsandbytes.nn.Linear8bitLt`` stores it.

    The layer also rounds its input to 8 bits, except the columns with a value above a threshold
    (LLM.int8). In training mode on a CPU it does not round. Gradients treat the rounding as the
    identity (straight-through), as in bitsandbytes.

    Attributes:
        codes: int8, shape (d_out, d_in).
        scales: float32, shape (d_out,): the value of the largest code, 127.
        threshold: A column of inputs with a larger value is not rounded; 0 rounds all columns.
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
        """True if one row of the input changes the output of another row."""
        return self.rounds and self.threshold > 0

    @property
    def shape(self) -> torch.Size:
        """(d_out, d_in)."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self.codes.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Dequantise.

        Returns:
            Shape (d_out, d_in).
        """
        return self.codes.to(dtype).mul_(self.scales[:, None] * (1 / 127))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute ``x Wᵀ + b`` by bitsandbytes' kernel, without derivatives.

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
            rows = rows.clone()  # the CPU kernel writes into its input for a while
        y: Tensor = bitsandbytes.matmul(rows, self.codes, state=state, bias=bias)
        return y.reshape(*x.shape[:-1], -1)


Packed: TypeAlias = Packed4 | Packed8
