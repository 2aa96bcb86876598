"""Checks of an adapter, a model and the active transforms, before a call."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_func.adapter import check_leaves, size_of
from lora_func.compat import transformed
from lora_func.errors import BusyModelError
from lora_func.modules import inner_model, old_sharding, original_parameters
from lora_func.runtime._layout import ModelLayout, layout_of, present


def check_unattached(model: nn.Module, attached: str | None) -> None:
    """Check that a model has no adapter attached, which would act beside another one.

    Args:
        model: The model.
        attached: What ``attached_path`` found in it.

    Raises:
        BusyModelError: If it has one.
    """
    if attached is not None:
        raise BusyModelError(
            f"{attached or type(model).__name__}: has an adapter attached, which would act as well;"
            " call remove() on its handle first, or call the model itself"
        )


def check_transformable(layout: ModelLayout, model: nn.Module) -> None:
    """Check that a model can run under the transforms that are active.

    Raises:
        RuntimeError: If FSDP1 or ZeRO-3 shards it, a layer would write its running statistics, a
            quantised layer has its own forward, or activations are checkpointed while compiling.
    """
    if not transformed():
        return
    engine = None if torch.compiler.is_compiling() else old_sharding(model)
    if engine is not None:
        raise RuntimeError(
            f"{type(model).__name__}: is sharded by {engine}, which no transform of torch.func can "
            "run; use autograd, or fully_shard (FSDP2)"
        )
    if layout.unknown_quantised:
        raise RuntimeError(
            f"{layout.unknown_quantised[0][0]}: derives from a quantised layer of bitsandbytes and "
            "has a forward of its own, which loses derivatives under transforms; use autograd"
        )
    for norm in present(layout.norms):
        if norm.training and getattr(norm, "track_running_stats", True):
            raise RuntimeError(
                f"{type(norm).__name__}: in training mode it writes its running statistics, which "
                "no transform of torch.func can; call eval() on it, since the base is frozen"
            )
    if not torch.compiler.is_compiling():
        return
    for module in present(layout.checkpoints):
        if module.gradient_checkpointing and module.training:
            raise RuntimeError(
                f"{type(module).__name__}: torch cannot compile activation checkpointing under a "
                "transform of torch.func; compile without it, or differentiate by autograd"
            )


def check_single_axes(layout: ModelLayout, params: Mapping[str, Tensor]) -> None:
    """Check that leaves are those of one adapter: the axis of a stack could pass for the batch's.

    Raises:
        ValueError: If a leaf has other axes than its variant names.
    """
    if [params[key].ndim for key in layout.ndims] == layout.usual_ndims:
        return
    for key, ndims in layout.ndims.items():
        if params[key].ndim not in ndims:
            raise ValueError(
                f"{key}: got shape {tuple(params[key].shape)}, expected {_axes_of(layout, key)}; a "
                "stack goes through torch.vmap or vcall"
            )


def _axes_of(layout: ModelLayout, key: str) -> str:
    """The axes of a leaf, for messages."""
    site = next(site for site in layout.sites if key in site.keys.values())
    leaf = next(leaf for leaf, its_key in site.keys.items() if its_key == key)
    if site.variant.parameters is not None:
        return str(tuple(original_parameters(site.module)[leaf].shape))
    axes = site.variant.axes[leaf]
    front = layout.ndims[key][0] - len(axes[0])
    return " or ".join(f"({', '.join((*['n'] * front, *words))})" for words in axes)


def check_single(params: Mapping[str, Tensor], model: nn.Module) -> ModelLayout:
    """Check that params are one adapter that fits its variants and a model.

    Returns:
        Its layout.

    Raises:
        KeyError: If a key is malformed, or names no variant or nothing in the model.
        TypeError: If a leaf is not a floating-point tensor, or a variant cannot adapt what a key
            names.
        ValueError: If params is a stack, a leaf is missing or unknown, a shape does not fit, or two
            variants name one module.
        BusyModelError: If the model has an adapter attached.
    """
    layout = layout_of(model, params)
    check_unattached(model, layout.attached)
    if front := check_leaves(params, model):
        key, leaf = next(iter(params.items()))
        raise ValueError(
            f"{key}: got shape {tuple(leaf.shape)}: params is a stack of {front[0]} adapters; take "
            "them one by one, from unstack(params)"
        )
    return layout


def stack_size(model: nn.Module, params: Mapping[str, Tensor]) -> int | None:
    """Tell an adapter from a stack by the axes of its leaves.

    Args:
        model: The model.
        params: An adapter, or a stack.

    Returns:
        The number of adapters in the stack; None for one adapter.

    Raises:
        KeyError: If a key names no module or parameter of the model, or no variant.
        TypeError: If a variant cannot adapt what a key names.
        ValueError: If a leaf is missing, or the leaves are neither those of an adapter nor of a
            stack.
    """
    layout = layout_of(inner_model(model), params)
    ndims = [params[key].ndim for key in layout.ndims]
    if ndims == layout.usual_ndims:
        return None
    fronts = {0, 1}
    for ndim, allowed in zip(ndims, layout.ndims.values(), strict=True):
        fronts &= {ndim - own for own in allowed}
    if len(fronts) != 1:  # the sizes decide, or refuse
        size = check_leaves(params, model)
        return size[0] if size else None
    return None if fronts == {0} else size_of(params)
