"""Whether an adapter has the leaves that its variants say, in the shapes that they say."""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lora_func.adapter._keys import RANK, SHARED, Key, group, parse
from lora_func.modules import place_of, uncompiled
from lora_func.runtime._layout import plan_of
from lora_func.variant import Variant
from lora_func.variants import by_name
from lora_func.weights._layers import Affine, affine, is_linear, matrix


def refuse_other_leaves(
    params: Mapping[str, Tensor], model: nn.Module | None = None
) -> tuple[int, ...]:
    """Refuse an adapter, or a stack, that is not what its variants say.

    Args:
        params: The adapter or the stack.
        model: The model it belongs to; with it sizes are compared with those of its weights.

    Returns:
        With a model the axes that a stack has before those of an adapter: (K,), or () for one.

    Raises:
        KeyError: If a key is malformed, or names no variant or nothing in the model.
        TypeError: If a leaf is no floating-point tensor, or a variant cannot adapt what a key
            names.
        ValueError: If there is no leaf, one is missing or unknown, or a shape does not fit.
    """
    if not params:
        raise ValueError("params: got no leaf")
    for key, leaf in params.items():
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"{key}: got {found}, expected a floating-point tensor")
    if model is not None:
        plan_of(uncompiled(model), params)
    stacks: dict[tuple[int, ...], str] = {}
    for (site, name), keys in group(params).items():
        keys.pop(RANK, None)
        variant, shapes = by_name(name), {leaf: (*params[k].shape,) for leaf, k in keys.items()}
        where = str(Key(site, name, ""))
        if variant.parameters is None:
            shared = {leaf for leaf, key in keys.items() if parse(key).site == SHARED}
            W = None if model is None else weight_at(uncompiled(model), site)
            leading = _leading_of_leaves(where, variant, shapes, shared, W)
        elif model is not None:
            module, _ = place_of(uncompiled(model), site)
            leading = _leading_of_parameters(where, shapes, module._parameters)
        if model is not None:
            stacks.setdefault(leading, where)
    if len(stacks) > 1 or max(map(len, stacks), default=0) > 1:
        axes = {where: axes for axes, where in stacks.items()}
        raise ValueError(f"leaves have leading axes {axes}; a stack has one, the same everywhere")
    return next(iter(stacks), ())


def weight_at(model: nn.Module, path: str) -> Affine:
    """Read the weight that a path names, with its bias.

    Args:
        model: The model.
        path: Of a linear layer, of another module that ``has_matrix``, or of a parameter.

    Returns:
        The weight, with a first axis more if it is a stack, and the bias.

    Raises:
        KeyError: If there is no such module or parameter.
        TypeError: If it is no matrix.
    """
    module, name = place_of(model, path)
    if name is None and is_linear(module):
        return affine(module, path)
    return matrix(module, module._parameters, name or "weight")


def _leading_of_leaves(
    where: str,
    variant: Variant,
    shapes: Mapping[str, tuple[int, ...]],
    shared: set[str],
    W: Affine | None,
) -> tuple[int, ...]:
    """The axes before those that a variant names, but for that of a stack of weights."""
    leading = _leading(where, variant, shapes, shared, () if W is None else W.weight.shape)
    if W is not None and variant.leaves:
        axes = variant.axes
        own = {leaf: shape[len(shape) - len(axes[leaf]) :] for leaf, shape in shapes.items()}
        d_out, d_in = W.weight.shape[-2:]
        if not _fit(variant.name, (*own.items(),), d_out, d_in):
            raise ValueError(f"{where}: leaves of shapes {own} do not fit a weight {d_out, d_in}")
    return leading


_Shapes: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]


@cache
def _fit(name: str, shapes: _Shapes, d_out: int, d_in: int) -> bool:
    """Whether a variant runs with such leaves; not if its blocks do not make up d_in, say."""
    # an apply that looks at numbers fails on the first device whatever the shapes
    return any(_runs(name, shapes, d_out, d_in, device) for device in ("meta", "cpu"))


def _runs(name: str, shapes: _Shapes, d_out: int, d_in: int, device: str) -> bool:
    zeros = partial(torch.zeros, device=device)
    leaves = {leaf: zeros(shape) for leaf, shape in shapes}
    try:
        y = by_name(name).apply(Affine(zeros(d_out, d_in)), leaves, zeros(1, d_in))
    except (RuntimeError, ValueError, IndexError):
        return False
    return y.shape == (1, d_out)


def _leading_of_parameters(
    where: str, shapes: Mapping[str, tuple[int, ...]], own: Mapping[str, Any]
) -> tuple[int, ...]:
    leading = set()
    for leaf, shape in shapes.items():
        expected = tuple(own[leaf].shape)
        split = len(shape) - len(expected)
        leading.add(shape[:split])
        if shape[split:] != expected or len(leading) > 1:
            raise ValueError(f"{where}{leaf}: got shape {shape}, the parameter has {expected}")
    return leading.pop()


def _leading(
    where: str,
    variant: Variant,
    shapes: Mapping[str, tuple[int, ...]],
    shared: set[str],
    weight: tuple[int, ...],
) -> tuple[int, ...]:
    known = variant.axes
    needed = {leaf for leaf in variant.leaves if not leaf.endswith("?")}
    if missing := needed - shapes.keys():
        raise ValueError(f"{where}{min(missing)}: this leaf is missing")
    if known and (extra := shapes.keys() - known.keys()):
        raise ValueError(f"{where}{min(extra)}: {variant.name} has no such leaf, but {[*known]}")
    sizes = dict(zip(("d_out", "d_in"), weight[-2:], strict=False))
    leading: set[tuple[int, ...]] = set()
    for leaf, axes in known.items():
        if leaf not in shapes:
            continue
        split = len(shapes[leaf]) - len(axes)
        named = zip(axes, shapes[leaf][max(split, 0) :], strict=False)
        fits = [n == (int(a) if a.isdigit() else sizes.setdefault(a, n)) for a, n in named]
        if leaf not in shared:
            leading.add(shapes[leaf][: max(split, 0)])
        if split < 0 or not all(fits) or len(leading) > 1:
            expected = ", ".join(
                f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes
            )
            raise ValueError(f"{where}{leaf}: got shape {shapes[leaf]}, expected ({expected})")
    found = next(iter(leading), ())
    if found[len(found) - len(weight[:-2]) :] != weight[:-2]:
        raise ValueError(f"{where}: leaves have leading axes {found}, the weight {weight[:-2]}")
    return found[: len(found) - len(weight[:-2])]
