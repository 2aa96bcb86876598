"""Clipping the gradients of adapters, each by itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.adapter import holds_stack, partition, size_of
from lora_func.checks import check_number
from lora_func.runtime import stack_size


def clip_grad_norm(
    adapters: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    max_norm: float,
    *,
    model: nn.Module | None = None,
) -> Tensor:
    """Scale the gradients of each adapter down to a norm, adapter by adapter.

    Args:
        adapters: What ``vcall`` takes, with gradients in ``.grad``: an adapter, a stack, or a list
            of adapters and stacks. An adapter is told from a stack by the axes of its leaves.
        max_norm: The largest norm that is left as it is.
        model: The model, where the leaves alone do not tell: adapters that have only ``Full``
            leaves, or only leaves of stacked experts, which without it are taken for a stack.

    Returns:
        The norms before, shape (K,). One that is not finite concerns its adapter alone.

    Raises:
        TypeError: If adapters is no mapping and no list of mappings.
        ValueError: If there is no adapter, no leaf has a gradient, the leaves of a stack have no
            common first axis, or only the model tells an adapter from a stack.

    Examples:
        >>> import torch, lora_func as lf
        >>> model, x = torch.nn.Linear(4, 2), torch.ones(5, 4)
        >>> adapters = [lf.init(model, lf.LoRA(r=2), seed=seed) for seed in range(3)]
        >>> losses = lf.vcall(model, adapters, x, loss_fn=lambda y, x: y.square().sum())
        >>> losses.sum().backward()
        >>> norms = lf.clip_grad_norm(adapters, max_norm=1.0)
    """
    check_number("max_norm", max_norm, above=0)
    each = as_list(adapters)
    if all(leaf.grad is None for one in each for leaf in one.values()):
        raise ValueError(
            "adapters: no leaf has a gradient; call backward() first, and give the leaves that the "
            "optimizer has"
        )
    norms = [_clipped(one, _size(one, model), max_norm) for one in each]
    return torch.cat([one.to(norms[0].device) for one in norms])


def as_list(given: Any) -> list[Mapping[str, Tensor]]:
    """Return the adapters and stacks that a user gave as a list.

    Raises:
        TypeError: If one of them is no mapping.
        ValueError: If there is none, or one is empty.
    """
    each = [given] if isinstance(given, Mapping) else [*given]
    for one in each:
        if not isinstance(one, Mapping):
            raise TypeError(
                f"adapters: got a {type(one).__name__}, expected an adapter or a stack, which are "
                "dicts of tensors, or a list of them"
            )
    if not all(each) or not each:
        raise ValueError("adapters: got no adapter, or one without leaves")
    return each


def _size(one: Mapping[str, Tensor], model: nn.Module | None) -> int | None:
    """The number of adapters in a stack; None for one adapter."""
    if model is not None:
        return stack_size(model, one)
    return size_of(one) if holds_stack(one) else None


def _clipped(one: Mapping[str, Tensor], size: int | None, max_norm: float) -> Tensor:
    if size is None:
        leaves = partition(one)[0].values()
        return torch.nn.utils.clip_grad_norm_(leaves, max_norm).reshape(1)
    gradients = [leaf.grad for leaf in one.values() if leaf.grad is not None]
    if not gradients:
        return torch.zeros(size)
    device = gradients[0].device
    of_each = [torch.linalg.vector_norm(g.reshape(size, -1), dim=1).to(device) for g in gradients]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(of_each), dim=0)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient).view(-1, *[1] * (gradient.ndim - 1)))
    return norms
