"""Embeddings and convolutions by products, without the adapted weight or a gradient of its size.

The one-hot rows of an embedding and the patches of a convolution are never built. An ``Operand``
stands for ``x`` in a variant's ``apply``: its products with matrices are rows of a table, and
convolutions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_func.compat import convolve
from lora_func.numerics import dropout
from lora_func.runtime._leaves import SiteLeaves
from lora_func.runtime._site import Site
from lora_func.runtime._views import check_not_parallel
from lora_func.weights import Affine


@dataclass(frozen=True, eq=False, repr=False)
class Operand:
    """Stands for rows x of which only products with matrices exist.

    Attributes:
        width: The width of the rows, d_in.
        dtype: Their dtype.
        product: Computes ``x Mᵀ + b`` of M, shape (m, d_in), and b, shape (m,) or None.
        dropped: Gives the rows with dropout, from its probability; one-hot rows drop nothing.
    """

    width: int
    dtype: torch.dtype
    product: Callable[[Tensor, Tensor | None], Tensor]
    dropped: Callable[[Tensor], "Operand"]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear:
            return _product(*args)
        if function is torch.matmul:
            x, M = args
            return _product(x, M.mT)
        return NotImplemented

    def __matmul__(self, M: Tensor) -> Tensor:
        return _product(self, M.mT)


def _product(x: Operand, M: Tensor, bias: Tensor | None = None) -> Tensor:
    if M.ndim != 2 or M.shape[1] != x.width:
        raise ValueError(
            f"got a factor of shape {tuple(M.shape)}, accepted is (m, {x.width}); a stack goes "
            "through torch.vmap or vcall"
        )
    return x.product(M, bias)


def run_by_products(
    site: Site, module: nn.Module, own: Mapping[str, Any], leaves: SiteLeaves, x: Tensor
) -> Tensor:
    """Run an embedding or a convolution with its adapter.

    Args:
        site: The site.
        module: A module that ``runs_by_products`` accepts.
        own: The module's own parameters.
        leaves: The site's leaves.
        x: Ids of any shape, or images (..., channels, *sizes).

    Returns:
        What the adapted module returns.
    """
    check_not_parallel(site, own["weight"])
    if isinstance(module, nn.Embedding):
        y = lookup(site, own, leaves, x, None, module.padding_idx)
        assert y is not None
        return y
    return _convolution(site, module, own, leaves, x)


def lookup(
    site: Site,
    own: Mapping[str, Any],
    leaves: SiteLeaves,
    ids: Tensor,
    weight: object,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    """Look up rows of an adapted table: ``torch.nn.functional.embedding`` without the table.

    Args:
        site: The site.
        own: The module's own parameters.
        leaves: The site's leaves.
        ids: Ids of any shape.
        weight: Not used.
        padding_idx: As in torch.
        max_norm: As in torch.
        norm_type: As in torch.
        scale_grad_by_freq: As in torch.
        sparse: As in torch.

    Returns:
        Shape (*ids.shape, d); None if the values of the whole table are needed.
    """
    if max_norm is not None or scale_grad_by_freq:
        return None
    table = own["weight"]
    n = len(table)
    rows: Any = Operand(
        n, table.dtype, lambda M, _: F.embedding(ids, M.mT, padding_idx), lambda rate: rows
    )
    y = site.variant.apply(Affine(table.mT), leaves.suited(rows), rows)
    if padding_idx is None:
        return y
    return torch.where((ids == padding_idx % n)[..., None], y.detach(), y)


def _convolution(
    site: Site, module: Any, own: Mapping[str, Any], leaves: SiteLeaves, image: Tensor
) -> Tensor:
    frozen, bias = own["weight"], own["bias"]
    channels, W = 1 - frozen.ndim, frozen.flatten(1)

    def patches(image: Tensor) -> Operand:
        def product(M: Tensor, bias: Tensor | None) -> Tensor:
            filters = frozen if M is W else M.reshape(-1, *frozen.shape[1:])
            return convolve(module, image, filters, bias).movedim(channels, -1)

        return Operand(W.shape[1], image.dtype, product, lambda rate: patches(dropout(image, rate)))

    x: Any = patches(image)
    y = site.variant.apply(Affine(W, bias), leaves.suited(x), x)
    return y.movedim(-1, channels)
