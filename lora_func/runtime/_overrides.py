"""What a module runs in place of its own forward while an adapter is injected."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_func.compat import IS_PARAMETER, OLD_FORWARD, tree_map_only, without_torch_function
from lora_func.errors import BusyModelError, UnusedLeafError
from lora_func.modules import Sharding, is_spread
from lora_func.runtime._losses import LossPerAdapter
from lora_func.runtime._parallel import inner_forward
from lora_func.runtime._patches import Patch
from lora_func.weights import affine, is_packed, is_quantised, linear

Forward: TypeAlias = Callable[..., Any]


def check_used(unused: Iterable[set[str] | None]) -> None:
    """Check that every leaf had a part in a call.

    Args:
        unused: For each adapter, the keys that nothing has used.

    Raises:
        UnusedLeafError: If there is any.
    """
    keys = set().union(*filter(None, unused))
    if keys:
        raise UnusedLeafError(
            f"{len(keys)} leaves had no part in this call, such as {min(keys)!r}: the model skips "
            "the layer, or only reads its weight past it, or the variant has no such leaf; leave "
            "them out of the adapter, or name the weight with target_parameters, or pass "
            "strict=False"
        )


@dataclass(slots=True, eq=False, repr=False)
class CallState:
    """What the overrides of one call share.

    Attributes:
        unused: The keys of the first adapter that nothing has used yet; None while compiling.
        losses: The mode that splits losses by adapter, if several adapters share the call; an
            adapted module computes no loss.
        sharding: The modules whose parameters an engine shards.
        live: False after the call: an override that a shallow copy has kept then runs the
            original forward.
    """

    unused: set[str] | None
    losses: LossPerAdapter | None
    sharding: Sharding
    live: bool = True


class Uncopied:
    """What stands in a model during a call; copies and pickles would keep the adapter for good."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise BusyModelError(
            "a model cannot be copied or pickled while it runs with an adapter; do it before or "
            "after, or use skeleton(model)"
        )


@dataclass(slots=True, eq=False, repr=False)
class ForwardOverride(Uncopied):
    """A module's forward during a call: what the module runs without an adapter.

    Attributes:
        replaced: The function on the instance that it replaces; None if that is the class's.
        module: The module.
        path: The module's path, for messages.
    """

    replaced: Forward | None
    module: nn.Module
    path: str

    @property
    def original(self) -> Forward:
        """The forward that it replaces."""
        if self.replaced is not None:
            return self.replaced
        return partial(type(self.module).forward, self.module)

    @property
    def base(self) -> Forward:
        """What the module runs without an adapter: the same, except for a quantised layer."""
        if type(self.module) is nn.Linear or not is_quantised(self.module):
            return self.original
        return self._run_quantised

    def _run_quantised(self, x: Tensor) -> Tensor:
        return linear(x, affine(self.module, self.path))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)


def override_forward(
    module: nn.Module, path: str, kind: Callable[..., ForwardOverride], *settings: Any
) -> Patch:
    """Make the patch with which a module runs another forward.

    Args:
        module: The module.
        path: Its path, for messages.
        kind: The override; called with the function that it replaces, the module, its path and the
            settings.
        *settings: The settings.

    Returns:
        The patch.

    Raises:
        TypeError: If the user's own function stands in the place of the forward.
    """
    own = module.__dict__
    slot = OLD_FORWARD if OLD_FORWARD in own else "forward"
    found = own.get(slot)
    place: Any = own
    inner = inner_forward(found)
    if inner is not None:
        place, found = inner, inner.get(slot, None)
    if isinstance(found, ForwardOverride):
        found = found.replaced
    elif found is not None and slot == "forward" and inner is None:
        raise TypeError(
            f"{path}: its forward was replaced on the instance, by {found!r}, which would be "
            "bypassed; remove that, or leave an adapted site out of the adapter"
        )
    return place, slot, kind(found, module, path, *settings)


class AdaptedTensor(Tensor):
    """An adapted parameter that is computed when an operation needs its values.

    Models often read only the dtype or the device of a weight, which must cost nothing. Its own
    values are NaN, so that code which this class cannot see does not get the frozen ones.

    Attributes:
        compute: Computes the parameter.
        lookup: Runs ``torch.nn.functional.embedding`` on it; None, or a result of None, if the
            values are needed.
        lent: The stored parameter, and the original one; a tracker stores them again.
    """

    compute: Callable[[], Tensor]
    lookup: Callable[..., Tensor | None] | None
    lent: tuple[Any, Any]

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> Any:
        """Make a parameter: accelerate calls the class of what it read."""
        return nn.Parameter(data, requires_grad)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.data_ptr and hasattr(args[0], "lent"):
            return args[0].lent[1].data_ptr()  # accelerate looks a weight up by its memory
        if function in _METADATA or (function in _CASTS and _keeps_no_values(args)):
            with without_torch_function():
                return function(*args, **kwargs)
        if function is F.embedding:
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            rows: Tensor | None = weight.lookup(*args, **kwargs) if weight.lookup else None
            if rows is not None:
                return rows
        args, kwargs = tree_map_only(cls, lambda t: t.compute(), (args, kwargs))
        return function(*args, **kwargs)


_PROPERTIES = ["shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "is_cpu"]
_PROPERTIES += ["is_cuda", "is_meta", "is_sparse", "is_quantized", "requires_grad", "is_leaf"]
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.is_floating_point),
    *(Tensor.get_device, Tensor.element_size, Tensor.is_complex, Tensor.__len__),
    *(torch.numel, torch.is_floating_point, torch.is_complex, Tensor.new_zeros),
    *(Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor),
    *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like),
    *(torch.rand_like, torch.randn_like),
}
_CASTS = {Tensor.to, Tensor.type_as}


def _keeps_no_values(args: Sequence[Any]) -> bool:
    """True if a cast takes only the kind of its second argument, or goes to the meta device."""
    to_meta = any(str(arg) == "meta" for arg in args[1:] if not isinstance(arg, Tensor))
    return to_meta or not isinstance(args[0], AdaptedTensor)


def adapted_tensor(
    stored: Tensor | None,
    compute: Callable[[], Tensor],
    lookup: Callable[..., Tensor | None] | None = None,
) -> Any:
    """Return what is read for a stored parameter while an adapter is injected.

    Args:
        stored: The stored parameter.
        compute: Computes the adapted one.
        lookup: Called in place of ``torch.nn.functional.embedding``; None if it may not be.
    """
    if stored is None or is_packed(stored):
        return stored
    if is_spread(stored):
        return compute()
    unknown = stored.detach().new_full((), torch.nan).expand(stored.shape)
    found = unknown.as_subclass(AdaptedTensor)
    found.compute, found.lookup = compute, lookup
    setattr(found, IS_PARAMETER, True)
    return found
