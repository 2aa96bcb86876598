"""How layers store their weights: the only file that knows.

Everything else sees a frozen layer as the affine map ``x -> x Wᵀ + b`` with ``W`` of shape (d_out,
d_in) and reads it through :func:`linear` and :func:`dense` alone.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch.nn.functional as F
from torch import Tensor, device, dtype, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lora_func.weights._bitsandbytes import is_packed, is_quantised, packed
from lora_func.weights._packed import Packed
from lora_func.weights._quantised import quantised_linear, quantised_times


class Affine(NamedTuple):
    """A frozen layer ``x -> x Wᵀ + b``, as a variant sees it.

    The bias travels with the weight because one fused kernel call rounds differently from a product
    and a sum: only so is an adapter that changes nothing equal to the layer bit for bit.

    Attributes:
        weight: ``W``, shape (d_out, d_in); packed where the layer is quantised.
        bias: ``b``, shape (d_out,), or None.
    """

    weight: Tensor | Packed
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        d_out, d_in = self.weight.shape
        return d_out, d_in

    @property
    def dtype(self) -> dtype:
        """What the weight computes in."""
        return self.weight.dtype

    @property
    def device(self) -> device:
        """Where the weight lies."""
        return self.weight.device


Weight: TypeAlias = Tensor | Affine


def linear(x: Tensor, W: Weight) -> Tensor:
    """Apply a frozen layer: ``x Wᵀ``, plus the bias if ``W`` carries one.

    Args:
        x: Activations, shape (..., d_in).
        W: The frozen weight, or the weight with its bias.

    Returns:
        Shape (..., d_out).
    """
    weight, bias = W if isinstance(W, Affine) else (W, None)
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    return quantised_linear(x, weight, bias)


def times(A: Tensor, W: Weight) -> Tensor:
    """Compute ``A Wᵀ`` for a matrix that is no activation; an 8-bit layer would round it.

    Args:
        A: Shape (..., d_in).
        W: The frozen weight; a bias that it carries is left out.

    Returns:
        Shape (..., d_out), in the dtype of W.
    """
    weight, A = W.weight if isinstance(W, Affine) else W, A.to(W.dtype)
    return F.linear(A, weight) if isinstance(weight, Tensor) else quantised_times(A, weight)


def dense(W: Weight) -> Tensor:
    """Return a frozen weight as an ordinary tensor, which nobody may write into.

    Args:
        W: The frozen weight, or the weight with its bias.

    Returns:
        Shape (d_out, d_in); dequantised where the layer is quantised.
    """
    weight = W.weight if isinstance(W, Affine) else W
    return weight if isinstance(weight, Tensor) else weight.dense(weight.dtype)


def bias_of(W: Weight) -> Tensor | None:
    """Return the bias that a frozen weight carries, or None."""
    return W.bias if isinstance(W, Affine) else None


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear map whose weight we can read.

    A subclass of ``nn.Linear`` with a forward of its own computes something else, and is not.

    Args:
        module: Any module.

    Returns:
        True for ``nn.Linear``, transformers' ``Conv1D`` and bitsandbytes' quantised layers.
    """
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or _is_conv1d(module) or is_quantised(module)


def affine(module: nn.Module, path: str = "") -> Affine:
    """Read the weight and bias of a linear-like module as they are now; no copy is made.

    Args:
        module: A module that ``is_linear`` accepts.
        path: Its path, for messages.

    Returns:
        Both.

    Raises:
        ValueError: If it is to be quantised and is not yet, or is for inference alone.
        TypeError: If it quantises a weight that it trains.
    """
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    if is_quantised(module):
        return Affine(packed(module, path), bias)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return Affine(weight if isinstance(module, nn.Linear) else weight.T, bias)


def has_matrix(module: nn.Module) -> bool:
    """Tell whether a module's weight is a matrix that a variant can change.

    Args:
        module: Any module.

    Returns:
        True for what ``is_linear`` accepts, for convolutions (not transposed ones) and embeddings.
    """
    embedding = isinstance(module, nn.Embedding) and not is_packed(module.weight)
    return is_linear(module) or _is_convolution(module) or embedding


def matrix(module: nn.Module, own: Mapping[str, Any], name: str = "weight") -> Affine:
    """Read a parameter as the matrix of an affine map, with its bias where it has one.

    A convolution of shape (d_out, c, ...) is the matrix (d_out, c * ...), an embedding of shape
    (n, d) the matrix (d, n) that a one-hot row goes through. Three axes that are no convolution
    are a stack of matrices (n, d_out, d_in), such as the experts of a mixture.

    Args:
        module: Any module.
        own: Its parameters.
        name: Which of them.

    Returns:
        The weight, with a first axis more if it is a stack, and the bias.

    Raises:
        TypeError: If the parameter is no matrix.
    """
    found = own[name]
    if is_packed(found):
        raise TypeError(f"{name!r} is packed by bitsandbytes; name its module with target_modules")
    if _is_convolution(module) and name == "weight":
        found = found.flatten(1)
    elif found.ndim not in (2, 3) or isinstance(module, _ConvTransposeNd):
        raise TypeError(f"{name!r} has shape {tuple(found.shape)} and is no matrix")
    beside = bias_name(own, name)
    bias = None if beside is None else own[beside]
    if bias is not None and bias.ndim != found.ndim - 1:
        raise TypeError(
            f"{name!r} has shape {tuple(found.shape)}, {beside!r} {tuple(bias.shape)}: no matrix "
            "with its bias, and no stack of them"
        )
    return Affine(found.mT if _is_transposed(module, name, found) else found, bias)


def refuse_computed(path: str, own: Mapping[str, Any], name: str) -> None:
    """Refuse a weight that the module does not keep as a parameter, such as a parametrized one.

    Raises:
        TypeError: If it is one.
    """
    if own.get(name) is None:
        raise TypeError(f"{path}: its weight is computed when it is read; remove what computes it")


def stored(module: nn.Module, own: Mapping[str, Any], name: str, weight: Tensor) -> Tensor:
    """Give what ``matrix`` read back the layout in which the module keeps it."""
    found = weight.mT if _is_transposed(module, name, weight) else weight
    return found.reshape(own[name].shape)


def is_stack(W: object) -> bool:
    """Tell whether this is a stack of matrices, as ``matrix`` reads it."""
    return isinstance(W, Affine) and len(W.weight.shape) == 3


def matrices(W: Any) -> list[Any]:
    """Return the matrices of a stack, each with its bias; of anything else a list of that."""
    if not is_stack(W):
        return [W]
    biases = [None] * len(W.weight) if W.bias is None else W.bias
    return [Affine(weight, bias) for weight, bias in zip(W.weight, biases, strict=True)]


def bias_name(own: Mapping[str, Any], name: str) -> str | None:
    """Name the parameter, possibly None, that is added to what a weight gives."""
    beside = f"{name.removesuffix('weight')}bias" if name.endswith("weight") else f"{name}_bias"
    return beside if beside in own else None


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)


def _is_transposed(module: nn.Module, name: str, weight: Tensor) -> bool:
    if isinstance(module, nn.Embedding) or _is_conv1d(module):
        return name == "weight"
    # how transformers' experts say that theirs are (n, d_in, d_out)
    return weight.ndim == 3 and bool(getattr(module, "is_transposed", False))


def _is_conv1d(module: nn.Module) -> bool:
    # by name, so that transformers stays unimported
    for found in type(module).__mro__:
        if found.__name__ == "Conv1D" and found.__module__ == "transformers.pytorch_utils":
            return type(module).forward is getattr(found, "forward", None)
    return False
