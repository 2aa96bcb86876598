"""Rows that a model selects by their values: how many an adapter has of them cannot be known.

Only a proof looks for them, with the model's own operations as witnesses.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_func.errors import FoldError
from lora_func.runtime._trees import tensors_of

_MARK = "_lora_func_selected"


class Selections(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Marks what depends on a shape that depends on values, such as ``x[mask]``."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = tensors_of((args, kwargs))
        if _selects(func, inputs) or any(hasattr(tensor, _MARK) for tensor in inputs):
            # what has the shape of something unselected has its rows, as when a part is put back
            whole = {tensor.shape for tensor in inputs if not hasattr(tensor, _MARK)}
            for tensor in tensors_of(output):
                if tensor.shape not in whole:
                    setattr(tensor, _MARK, True)
        return output


def refuse_selected(what: str, values: Iterable[Any]) -> None:
    """Refuse a selection of rows.

    Args:
        what: What gets them.
        values: What it gets. A marked tensor of three axes and more still has its batch axis.

    Raises:
        FoldError: If it is one.
    """
    if any(isinstance(v, Tensor) and v.ndim < 3 and hasattr(v, _MARK) for v in values):
        raise FoldError(
            f"{what}: the model selects rows by their values, and how many of them belong to which "
            'adapter cannot be known; pass fallback="loop"'
        )


def _selects(func: Any, inputs: Iterable[Tensor]) -> bool:
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    # indexing has a known shape unless the index is a mask
    masks = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in inputs)
    return masks or func is not torch.ops.aten.index.Tensor
