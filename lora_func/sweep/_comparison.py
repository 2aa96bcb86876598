"""Whether two results are the same but for rounding."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten


def difference(ours: Any, theirs: Any, precision: float) -> str | None:
    """Tell how two results differ, if by more than rounding.

    Args:
        ours: One; a part that it leaves out may be anything.
        theirs: The other.
        precision: The coarsest epsilon with which something was computed.

    Returns:
        The difference in words, or None.
    """
    (ours, layout), (theirs, other) = tree_flatten(ours), tree_flatten(theirs)
    if layout != other:
        return f"{layout}, {other}"
    for a, b in zip(ours, theirs, strict=True):
        if not isinstance(b, Tensor):
            if a is not None and a != b:
                return f"{a}, {b}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype} {tuple(a.shape)}, {b.dtype} {tuple(b.shape)}"
        elif not (b.is_floating_point() or b.is_complex()):
            if not torch.equal(a, b):
                return f"other {b.dtype}s"
        elif (off := _relative_error(a, b)) > _rounding(b, precision):
            return f"off by {off:.1e} of its norm"
    return None


def _relative_error(a: Tensor, b: Tensor) -> float:
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a[b.isfinite()], b[b.isfinite()]
    return float((a - b).norm() / b.norm().clamp(min=1e-30)) if b.numel() else 0.0


def _rounding(tensor: Tensor, precision: float) -> float:
    """What kernels for more rows may round otherwise; in half precision they do so a lot."""
    single = torch.finfo(torch.float32).eps
    eps = max(precision, torch.finfo(tensor.dtype).eps)
    return eps**0.5 if eps > single else (200 if tensor.ndim else 20) * single
