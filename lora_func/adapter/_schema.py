"""The check of leaves against their variants: which leaves there are, and in which shapes."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.adapter._keys import RANK, SHARED, Key, check_adapter, group, parse
from lora_func.modules import (
    check_not_flattened,
    find_site,
    inner_model,
    original_parameters,
)
from lora_func.variant import Variant, fit
from lora_func.variants import by_name
from lora_func.weights import Affine, weight_at

Shape = tuple[int, ...]


def check_leaves(params: Mapping[str, Tensor], model: nn.Module | None = None) -> Shape:
    """Check an adapter, or a stack, against its variants.

    Args:
        params: The adapter or the stack.
        model: The model it belongs to; with it, sizes are compared with those of its weights.

    Returns:
        With a model, the axes that a stack has in front of an adapter's: (K,), or () for one
        adapter.

    Raises:
        KeyError: If a key is malformed, or names no variant or nothing in the model.
        TypeError: If params is no mapping, or a leaf is not a floating-point tensor.
        ValueError: If there is no leaf, a leaf is missing or unknown, a shape does not fit, or
            FSDP1 has flattened the model's weights.
    """
    check_adapter(params)
    if not params:
        raise ValueError("params: got no leaf")
    for key, leaf in params.items():
        _check_float(key, leaf)
    if model is not None:
        model = inner_model(model)
        check_not_flattened(model)
    stacks: dict[Shape, str] = {}
    runs: set[Any] = set()
    for (site, name), keys in group(params).items():
        keys.pop(RANK, None)
        variant, shapes = by_name(name), {leaf: (*params[k].shape,) for leaf, k in keys.items()}
        where = str(Key(site, name, ""))
        if variant.parameters is None:
            shared = {leaf for leaf, key in keys.items() if parse(key).site == SHARED}
            W = None if model is None else weight_at(model, site)
            front = check_site(where, variant, shapes, shared, W)
            if W is not None:
                _check_run(where, variant, shapes, W, runs)
        elif model is not None:
            module, _ = find_site(model, site)
            front = _front_of_parameters(where, shapes, original_parameters(module))
        if model is not None:
            stacks.setdefault(front, where)
    if len(stacks) > 1 or max(map(len, stacks), default=0) > 1:
        axes = {where: axes for axes, where in stacks.items()}
        raise ValueError(f"leaves have leading axes {axes}; a stack has one, the same everywhere")
    return next(iter(stacks), ())


def _check_float(key: str, leaf: object) -> None:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
        raise TypeError(f"{key}: got {found}, expected a floating-point tensor")


def check_site(
    where: str,
    variant: Variant,
    shapes: Mapping[str, Shape],
    shared: set[str],
    W: Affine | None,
) -> Shape:
    """Check the leaves of one site.

    Args:
        where: What messages put in front of a leaf's name.
        variant: The site's variant.
        shapes: Leaf -> its shape.
        shared: The leaves that stand under ``*``, which have no axis of a stack of weights.
        W: The frozen weight, if it is known; possibly a stack of weights.

    Returns:
        The axes in front of an adapter's, without the axis of a stack of weights.

    Raises:
        ValueError: If a leaf is missing or unknown, or a shape does not fit.
    """
    check_required(where, variant, shapes)
    if extra := shapes.keys() - variant.axes.keys():
        raise ValueError(
            f"{where}{min(extra)}: {variant.name} has no such leaf, but {[*variant.axes]}"
        )
    fronts, of_stack = _fronts(where, variant, shapes, W), () if W is None else W.weight.shape[:-2]
    own = {leaf: front for leaf, front in fronts.items() if leaf not in shared}
    first = next(iter(own.values()), ())
    for leaf, front in own.items():
        if front != first:
            words = " or ".join(", ".join(words) for words in variant.axes[leaf])
            raise ValueError(f"{where}{leaf}: got shape {shapes[leaf]}, expected ({words})")
    if first[len(first) - len(of_stack) :] != tuple(of_stack):
        raise ValueError(f"{where}: leaves have leading axes {first}, the weight {(*of_stack,)}")
    return first[: len(first) - len(of_stack)]


def check_required(where: str, variant: Variant, leaves: Collection[str]) -> None:
    """Check that a site has all leaves that its variant requires.

    Args:
        where: What messages put in front of a leaf's name.
        variant: The site's variant.
        leaves: The names of its leaves.

    Raises:
        ValueError: If one is missing.
    """
    if missing := variant.required.difference(leaves):
        raise ValueError(
            f"{where}{min(missing)}: this leaf is missing; {{**trained, **constants}} joins what "
            "partition split, and init and load give all leaves"
        )


def _fronts(
    where: str, variant: Variant, shapes: Mapping[str, Shape], W: Affine | None
) -> dict[str, Shape]:
    """Leaf -> the axes in front of those that the variant names."""
    ordered = {leaf: shapes[leaf] for leaf in variant.axes if leaf in shapes}
    sizes = {} if W is None else dict(zip(("d_out", "d_in"), W.weight.shape[-2:], strict=True))
    try:
        return fit(variant.axes, ordered, sizes)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def _check_run(
    where: str, variant: Variant, shapes: Mapping[str, Shape], W: Affine, done: set[Any]
) -> None:
    """Try the variant on zeros of these shapes: axes cannot say everything."""
    fronts, (d_out, d_in) = _fronts(where, variant, shapes, W), W.weight.shape[-2:]
    own = {leaf: shape[len(fronts[leaf]) :] for leaf, shape in shapes.items()}
    key = (variant.name, *own.items(), d_out, d_in)
    # an apply that looks at numbers fails on the meta device, whatever the shapes
    devices = () if key in done else ("meta", "cpu")
    if devices and not any(_runs(variant, own, d_out, d_in, device) for device in devices):
        raise ValueError(f"{where}: leaves of shapes {own} do not fit a weight {d_out, d_in}")
    done.add(key)


def _runs(
    variant: Variant, shapes: Mapping[str, Shape], d_out: int, d_in: int, device: str
) -> bool:
    zeros = partial(torch.zeros, device=device)
    leaves = {leaf: zeros(shape) for leaf, shape in shapes.items()}
    try:
        y = variant.apply(Affine(zeros(d_out, d_in)), leaves, zeros(1, d_in))
    except (RuntimeError, ValueError, IndexError):
        return False
    return y.shape == (1, d_out)


def _front_of_parameters(where: str, shapes: Mapping[str, Shape], own: Mapping[str, Any]) -> Shape:
    front = set()
    for leaf, shape in shapes.items():
        if own.get(leaf) is None:
            raise KeyError(f"{where}{leaf}: the module has no parameter {leaf!r}")
        expected = tuple(own[leaf].shape)
        split = len(shape) - len(expected)
        front.add(shape[:split])
        if shape[split:] != expected or len(front) > 1:
            raise ValueError(f"{where}{leaf}: got shape {shape}, the parameter has {expected}")
    return front.pop()
