"""Embeddings and convolutions: what a variant multiplies there is no matrix of rows.

The one-hot rows of an embedding and the patches of a convolution are never built. They stand for
``x`` in a variant's ``apply`` as what their products with matrices are: rows looked up in a table,
and convolutions. So neither the adapted weight is made nor a gradient of its size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

from lora_func.runtime._layout import Site
from lora_func.weights._layers import Affine


def multiplies(site: Site, module: nn.Module) -> bool:
    """Tell whether a site can run by products with what stands for its x."""
    if site.parameter != "weight" or not site.variant.products_only:
        return False
    if isinstance(module, _ConvNd):
        plain = type(module) in _CONVOLUTIONS and "_conv_forward" not in vars(module)
        return plain and module.groups == 1
    return isinstance(module, nn.Embedding)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False, repr=False)
class Operand:
    """Stands for rows x, of which there are only products with matrices.

    Attributes:
        width: Their width, d_in.
        dtype: Their dtype.
        product: Computes ``x Mᵀ + b`` of M, shape (m, d_in), and b, shape (m,) or None.
    """

    width: int
    dtype: torch.dtype
    product: Callable[[Tensor, Tensor | None], Tensor]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear:
            return _times(*args)
        if function is torch.matmul:
            x, M = args
            return _times(x, M.mT)
        return NotImplemented

    def __matmul__(self, M: Tensor) -> Tensor:
        return _times(self, M.mT)


def _times(x: Operand, M: Tensor, bias: Tensor | None = None) -> Tensor:
    if M.ndim != 2 or M.shape[1] != x.width:
        raise ValueError(
            f"got a factor of shape {tuple(M.shape)}, accepted is (m, {x.width}); a stack goes "
            "through torch.vmap or vcall"
        )
    return x.product(M, bias)


@dataclass(frozen=True, eq=False, repr=False)
class AdaptedWeight:
    """Stands for the adapted weight of a layer while that runs; made where it is read otherwise.

    Attributes:
        site: The site.
        frozen: The frozen weight.
        leaves: The site's leaves.
        whole: Makes it.
    """

    site: Site
    frozen: Tensor
    leaves: Mapping[str, Tensor]
    whole: Callable[[], Tensor]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, run = kwargs or {}, _LAYERS.get(function)
        y = None if run is None else run(function, *args, **kwargs)
        if y is not None:
            return y
        args, kwargs = tree_map_only(cls, lambda weight: weight.whole(), (args, kwargs))
        return function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.frozen if name in _SAME else self.whole(), name)

    def apply(self, W: Affine, x: Operand) -> Tensor:
        """Run the variant's ``apply``."""
        rows: Any = x
        return self.site.variant.apply(W, self.leaves, rows)


def _operator(name: str) -> Callable[..., Any]:
    return lambda weight, *others: getattr(weight.whole(), name)(*others)


# Python looks an operator up in the class, and not by __getattr__
for _name in (
    *("getitem", "len", "iter", "bool", "deepcopy", "neg", "pos", "abs", "invert"),
    *("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "xor", "matmul", "rmatmul", "pow", "rpow"),
    *("add", "radd", "sub", "rsub", "mul", "rmul", "mod", "rmod"),
    *("truediv", "rtruediv", "floordiv", "rfloordiv"),
):
    setattr(AdaptedWeight, f"__{_name}__", _operator(f"__{_name}__"))

_SAME = {"shape", "dtype", "device", "ndim", "size", "dim"}
"""What the frozen weight tells of the adapted one."""


def _embedding(
    function: Callable[..., Tensor],
    ids: Tensor,
    weight: AdaptedWeight,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    if max_norm is not None or scale_grad_by_freq:
        return None
    n = len(weight.frozen)
    x = Operand(n, weight.dtype, lambda table, _: function(ids, table.mT))
    y = weight.apply(Affine(weight.frozen.mT), x)
    if padding_idx is None:
        return y
    return torch.where((ids == padding_idx % n)[..., None], y.detach(), y)


def _convolution(
    function: Callable[..., Tensor],
    image: Tensor,
    weight: AdaptedWeight,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    frozen, channels = weight.frozen, 1 - weight.ndim
    W = frozen.flatten(1)

    def product(M: Tensor, bias: Tensor | None) -> Tensor:
        filters = frozen if M is W else M.reshape(-1, *frozen.shape[1:])
        return function(image, filters, bias, stride, padding, dilation).movedim(channels, -1)

    y = weight.apply(Affine(W, bias), Operand(W.shape[1], image.dtype, product))
    return y.movedim(-1, channels)


_LAYERS: dict[Any, Callable[..., Tensor | None]] = {
    F.embedding: _embedding,
    **dict.fromkeys([F.conv1d, F.conv2d, F.conv3d], _convolution),
}
