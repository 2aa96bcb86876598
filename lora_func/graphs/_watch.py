"""Watching the first runs of a function: what waits for the GPU, and what it writes to."""

import traceback
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_func.compat import TorchDispatchMode, tree_leaves, written_arguments

_VALUE = "looks at the value of a tensor, as item(), a branch and a loop over sparse experts do"
_SIZE = "makes a tensor whose size depends on values, as indexing by a mask does"
_WAITS = {
    "_linalg_check_errors": "looks whether a matrix can be solved; the *_ex functions do not",
    "_local_scalar_dense": _VALUE,
    "_unique2": _SIZE,
    "bincount": _SIZE,
    "equal": _VALUE,
    "is_nonzero": _VALUE,
    "masked_select": _SIZE,
    "nonzero": _SIZE,
    "unique_consecutive": _SIZE,
    "unique_dim": _SIZE,
}
_COPIES = ("_to_copy", "copy_")
_OVERWRITES = ("copy_", "normal_", "uniform_", "random_", "bernoulli_")
_UNDECLARED = {"native_batch_norm": (3, 4), "cudnn_batch_norm": (3, 4), "miopen_batch_norm": (3, 4)}
"""The arguments that an operation writes to although its schema does not say so."""

_FILLS = {
    "new_ones": 1,
    "new_zeros": 0,
    "ones": 1,
    "ones_like": 1,
    "zeros": 0,
    "zeros_like": 0,
}


@dataclass(slots=True)
class _Made:
    """Memory that the function made.

    Attributes:
        storage: The memory, weakly.
        dtype: The dtype of the tensor for which it was made.
        run: The run in which it was made.
        fill: The number that it was filled with; None for other contents.
        changes: True if a later run writes to it, so that it is state and no cache.
    """

    storage: "weakref.ref[torch.UntypedStorage]"
    dtype: torch.dtype
    run: int
    fill: int | None
    changes: bool = False


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches runs of a function.

    Attributes:
        run: The number of the run, which the caller counts.
    """

    def __init__(self, arguments: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.run = 0
        self._arguments = {_place(tensor): name for name, tensor in arguments.items()}
        self._made: dict[int, _Made] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def restore(self) -> None:
        """Give all tensors that the function wrote to, and did not return, their former values."""
        with torch.no_grad():
            for tensor, before in self._before.values():
                tensor.copy_(before)
            for made in self._made.values():
                storage = made.storage()
                if storage is not None and made.changes and made.fill is not None:
                    _whole(storage, made.dtype).fill_(made.fill)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in _WAITS or _takes_a_mask(name, args):
            raise _refusal(name, _WAITS.get(name, _SIZE))
        given = _tensors((args, kwargs))
        for tensor in given:
            self._note_read(tensor)
        for tensor in _tensors(written_arguments(func, args, kwargs)):
            self._note_write(tensor, name)
        for tensor in _tensors([args[i] for i in _UNDECLARED.get(name, ())]):
            self._note_write(tensor, name)
        result = func(*args, **kwargs)
        found = _tensors(result)
        # a number on the CPU is an argument of the kernel, if it is not copied
        devices = {t.device for t in (*given, *found) if t.ndim or name in _COPIES}
        if len(devices) > 1:
            raise _refusal(name, f"works on {', '.join(sorted(map(str, devices)))} at once")
        known = {_place(tensor) for tensor in given}
        for tensor in found:
            if _place(tensor) not in known:
                storage = weakref.ref(tensor.untyped_storage())
                made = _Made(storage, tensor.dtype, self.run, _FILLS.get(name))
                self._made[_place(tensor)] = made
        return result

    def _made_of(self, tensor: Tensor) -> _Made | None:
        made = self._made.get(_place(tensor))
        return made if made is not None and made.storage() is tensor.untyped_storage() else None

    def _note_read(self, tensor: Tensor) -> None:
        made = self._made_of(tensor)
        if made is not None and 0 < made.run < self.run:
            raise RuntimeError(
                f"capture: the function keeps a tensor of shape {tuple(tensor.shape)} that it "
                f"makes anew in each run ({_caller()}); the graph would read the first one for "
                "good: write into one tensor (copy_, add_), or return the new one"
            )

    def _note_write(self, tensor: Tensor, name: str) -> None:
        place, made = _place(tensor), self._made_of(tensor)
        if place in self._arguments:
            raise RuntimeError(
                f"{self._arguments[place]}: the function writes to it, and would change the "
                "graph's copy in place of yours; let the function return the new value, or use the "
                "tensor from outside"
            )
        if made is None:
            if place not in self._before:
                whole = _whole(tensor.untyped_storage(), tensor.dtype)
                self._before[place] = whole, whole.clone()
        elif made.run == self.run:
            made.fill = None if name in _OVERWRITES else made.fill
        elif made.fill is None:
            raise RuntimeError(
                f"capture: the function keeps a tensor of shape {tuple(tensor.shape)} that it made "
                "in its first run, and writes to it in the next, as a gradient that adds up and "
                f"some optimizers do ({_caller()}); call the function once before, so that the "
                "tensor is there, or set gradients to None inside (zero_grad())"
            )
        else:
            made.changes = True


def _takes_a_mask(name: str, args: Any) -> bool:
    """True for an index that is a mask, whose places have to be counted first."""
    return name.startswith("index") and any(t.dtype == torch.bool for t in _tensors(args[1:2]))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _whole(storage: torch.UntypedStorage, dtype: torch.dtype) -> Tensor:
    """All of a memory as a tensor."""
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage)


def _tensors(tree: Any) -> list[Tensor]:
    found = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [tensor for tensor in found if tensor.layout == torch.strided]


def _refusal(name: str, why: str) -> RuntimeError:
    return RuntimeError(
        f"capture: the function waits for the GPU in {name} ({_caller()}), which {why}; no CUDA "
        "graph can hold that; leave it out of the function, or call it uncaptured"
    )


def _caller() -> str:
    """The line of the function that is at work, outside torch."""
    own = (torch.__path__[0], __file__)
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(own):
            return f"{frame.filename}:{frame.lineno}"
    return "in the backward pass"
