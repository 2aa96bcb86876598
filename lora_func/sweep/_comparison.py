"""Comparing two results up to rounding."""

from typing import Any

import torch
from torch import Tensor

from lora_func.compat import tree_flatten
from lora_func.sweep._caches import opened


def difference(found: Any, expected: Any, precision: float) -> str | None:
    """Describe how two results differ by more than rounding.

    Args:
        found: One result.
        expected: The other result.
        precision: The largest epsilon of the dtypes that computed them.

    Returns:
        The difference in words; None if there is none.
    """
    (values, layout), (others, other) = tree_flatten(opened(found)), tree_flatten(opened(expected))
    if layout != other:
        return f"{layout}, {other}"
    for a, b in zip(values, others, strict=True):
        if not isinstance(b, Tensor):
            if a != b:
                return f"{a}, {b}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype} {tuple(a.shape)}, {b.dtype} {tuple(b.shape)}"
        elif not (b.is_floating_point() or b.is_complex()):
            if not torch.equal(a, b):
                return f"different {b.dtype}s"
        elif (off := _relative_error(a, b)) > _rounding(b, precision):
            return f"off by {off:.1e} of its norm"
    return None


def _relative_error(a: Tensor, b: Tensor) -> float:
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a[b.isfinite()], b[b.isfinite()]
    return float((a - b).norm() / b.norm().clamp(min=1e-30)) if b.numel() else 0.0


def _rounding(tensor: Tensor, precision: float) -> float:
    """The relative error that kernels for more rows may have; large in half precision."""
    single = torch.finfo(torch.float32).eps
    eps = max(precision, torch.finfo(tensor.dtype).eps)
    return eps**0.5 if eps > single else (200 if tensor.ndim else 20) * single
