"""Reading modules as affine maps: which modules have a matrix, and in which layout."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_func.compat import is_convolution, is_transposed_convolution, parameters_of
from lora_func.modules import ReadTracker, find_site, original_parameters
from lora_func.weights._affine import Affine
from lora_func.weights._bitsandbytes import is_packed, is_quantised, packed


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' ``Conv1D``, found by name: transformers stays unimported."""
    return _has_forward_of(module, "transformers.pytorch_utils", "Conv1D")


def _is_falcon_linear(module: nn.Module) -> bool:
    """True for Falcon's ``nn.Linear``, whose own forward computes the same."""
    return _has_forward_of(module, "transformers.models.falcon.modeling_falcon", "FalconLinear")


def _has_forward_of(module: nn.Module, where: str, name: str) -> bool:
    for found in type(module).__mro__:
        if found.__name__ == name and found.__module__ == where:
            return type(module).forward is getattr(found, "forward", None)
    return False


def is_linear(module: nn.Module) -> bool:
    """True if a module is a linear map whose weight can be read.

    Args:
        module: Any module.

    Returns:
        True for ``nn.Linear``, transformers' ``Conv1D`` and bitsandbytes' quantised layers. False
        for a subclass of ``nn.Linear`` with its own forward, which computes something else.
    """
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain or is_conv1d(module) or _is_falcon_linear(module) or is_quantised(module)


def affine(module: nn.Module, path: str = "") -> Affine:
    """Read the current weight and bias of a linear layer, without a copy.

    Args:
        module: A module that ``is_linear`` accepts.
        path: Its path, for messages.

    Returns:
        The weight and the bias.

    Raises:
        ValueError: If the layer will be quantised and is not yet, or is repacked for inference.
        TypeError: If it quantises a weight that it trains.
    """
    bias = _stored(module, "bias")
    if is_quantised(module):
        return Affine(packed(module, path), bias)
    weight = _stored(module, "weight")
    return Affine(weight if isinstance(module, nn.Linear) else weight.T, bias)


def _stored(module: nn.Module, name: str) -> Any:
    """The stored parameter; a parametrized one is computed instead, by its attribute."""
    own = parameters_of(module)
    if name not in own:
        return getattr(module, name)
    return own.inner(name) if isinstance(own, ReadTracker) else own[name]


def has_matrix(module: nn.Module) -> bool:
    """True if a module's weight is a matrix that a variant can change.

    Args:
        module: Any module.

    Returns:
        True for linear layers, convolutions that are not transposed, and embeddings.
    """
    embedding = isinstance(module, nn.Embedding) and not is_packed(
        original_parameters(module)["weight"]
    )
    return is_linear(module) or is_convolution(module) or embedding


def matrix(module: nn.Module, own: Mapping[str, Any], name: str = "weight") -> Affine:
    """Read a parameter as the matrix of an affine map, with its bias if it has one.

    A convolution of shape (d_out, c, ...) is the matrix (d_out, c * ...). An embedding of shape
    (n, d) is the matrix (d, n) that multiplies a one-hot row. Any other parameter of three axes is
    a stack of matrices (n, d_out, d_in), such as the experts of a mixture.

    Args:
        module: Any module.
        own: Its parameters.
        name: The name of one of them.

    Returns:
        The weight, with one more axis in front if it is a stack, and the bias.

    Raises:
        TypeError: If the parameter is no matrix.
    """
    found, taps = own[name], 1
    if is_packed(found):
        raise TypeError(f"{name!r} is packed by bitsandbytes; name its module with target_modules")
    if is_convolution(module) and name == "weight":
        taps = found[0, 0].numel()
        found = found.flatten(1)
    elif found.ndim not in (2, 3) or is_transposed_convolution(module):
        raise TypeError(f"{name!r} has shape {tuple(found.shape)} and is no matrix")
    beside = bias_name(own, name)
    bias = None if beside is None else own[beside]
    if bias is not None and bias.ndim != found.ndim - 1:
        raise TypeError(
            f"{name!r} has shape {tuple(found.shape)}, {beside!r} {tuple(bias.shape)}: no matrix "
            "with its bias, and no stack of them"
        )
    table = isinstance(module, nn.Embedding) and name == "weight"
    return Affine(found.mT if _is_transposed(module, name, found) else found, bias, taps, table)


def weight_at(model: nn.Module, path: str) -> Affine:
    """Read the weight that a path names, with its bias.

    Args:
        model: The model.
        path: Path of a linear layer, of another module that ``has_matrix``, or of a parameter.

    Returns:
        The weight, with one more axis in front if it is a stack, and the bias.

    Raises:
        KeyError: If there is no such module or parameter.
        TypeError: If it is no matrix.
    """
    module, name = find_site(model, path)
    if name is None and is_linear(module):
        return affine(module, path)
    return matrix(module, original_parameters(module), name or "weight")


def check_not_computed(path: str, own: Mapping[str, Any], name: str) -> None:
    """Check that a module keeps a weight as a parameter; a parametrized weight is computed.

    Raises:
        TypeError: If the weight is computed when it is read.
    """
    if own.get(name) is None:
        raise TypeError(f"{path}: its weight is computed when it is read; remove what computes it")


def restore_layout(module: nn.Module, own: Mapping[str, Any], name: str, weight: Tensor) -> Tensor:
    """Bring a weight that ``matrix`` read back into the layout in which the module keeps it."""
    found = weight.mT if _is_transposed(module, name, weight) else weight
    return found.reshape(own[name].shape)


def bias_name(own: Mapping[str, Any], name: str) -> str | None:
    """Name the parameter, possibly None, that is added to the product with a weight."""
    beside = f"{name.removesuffix('weight')}bias" if name.endswith("weight") else f"{name}_bias"
    return beside if beside in own else None


def _is_transposed(module: nn.Module, name: str, weight: Tensor) -> bool:
    if isinstance(module, nn.Embedding) or is_conv1d(module):
        return name == "weight"
    # transformers' experts say so if theirs are (n, d_in, d_out)
    return weight.ndim == 3 and bool(getattr(module, "is_transposed", False))
