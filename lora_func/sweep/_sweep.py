"""Sweeps: K adapters in one call of one frozen model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lora_func.adapter import partition, size_of
from lora_func.checks import check_choice, check_count, check_number
from lora_func.errors import FoldError
from lora_func.runtime import LossFn, joined
from lora_func.runtime import stacked as stacked_trees
from lora_func.sweep._batching import batch_of, check_batched_axes
from lora_func.sweep._fold import Sweep
from lora_func.sweep._verification import verify

Stack: TypeAlias = Mapping[str, Tensor]


def vcall(
    model: nn.Module,
    stacked: Stack | Sequence[Stack],
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    batched: bool = False,
    chunk: int | None = None,
    check: Literal["first", "never"] = "first",
    fallback: Literal["raise", "loop"] = "raise",
    strict: bool = True,
) -> Any:
    """Call a frozen model with K adapters at once.

    ``vcall`` means ``torch.vmap(fcall, in_dims=(None, 0, None))`` and gives the same numbers. It
    folds the adapters into the rows of the batch: the base runs once on K times the rows, without a
    transform, and only the adapters are batched. So fused attention, padding masks, checkpointing
    and dropout (drawn for each adapter) work as in a plain call.

    The losses are independent: take gradients of their sum, not of their mean.

    Args:
        model: The model. Its rows must not depend on each other.
        stacked: A result of ``stack``; or several of them, of any variants, whose adapters follow
            one another.
        batch: As for ``fcall``, with the rows on the first axis of every tensor; a tensor with a
            single row is shared by all rows.
        loss_fn: Called as ``loss_fn(output, batch)`` for each adapter, with the output that the
            model would give for it alone.
        batched: Whether each adapter has its own batch: tensors (K, rows, ...).
        chunk: How many adapters to run at a time, to save memory; None for all.
        check: "first": compare the first call with adapters of these keys and a batch of this kind
            with solo runs, of the first and the last adapter of each stack, in eval mode, with
            perturbed leaves. "never": trust that the model keeps its rows apart, as is done while
            compiling.
        fallback: What to do if the adapters cannot share a call: "raise" the ``FoldError``, or
            "loop" over the adapters. Other errors are always raised.
        strict: As for ``fcall``.

    Returns:
        The stacked results of ``fcall`` for each adapter: losses (K,); outputs with an axis K in
        front if there is neither a loss nor a loss_fn.

    Raises:
        FoldError: If the adapters cannot share a call: the model mixes rows, reads an adapted
            parameter past its module, or has rows on another axis than the first.
        RuntimeError: If a first call would have to be checked inside ``torch.vmap``.
        ValueError: If stacked is no stack, chunk is less than 1, or a tensor of a batched batch
            does not have K in front.

    Example:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> loras = lf.stack([lf.init(model, lf.LoRA(r=2), seed=seed) for seed in range(3)])
        >>> gains = lf.stack([lf.init(model, lf.IA3())])
        >>> losses = lf.vcall(
        ...     model, [loras, gains], torch.ones(5, 4), loss_fn=lambda y, x: y.square().mean()
        ... )
        >>> losses.shape
        torch.Size([4])
    """
    check_choice("check", check, ("first", "never"))
    check_choice("fallback", fallback, ("raise", "loop"))
    if chunk is not None:
        check_count("chunk", chunk)
    stacks = [stacked] if isinstance(stacked, Mapping) else [*stacked]
    sizes = [size_of(stack) for stack in stacks]
    if not sum(sizes):
        raise ValueError("stacked: got no adapter")
    if batched:
        check_batched_axes(batch, sum(sizes))
    pieces = []
    for share, of_each, place in _shares(stacks, sizes, chunk or sum(sizes)):
        own = batch_of(batch, batched, place)
        sweep = Sweep(model, share, of_each, own, batched, loss_fn, strict)
        pieces.append(_run(sweep, check, fallback))
    return joined(pieces)


def _shares(
    stacks: Sequence[Stack], sizes: Sequence[int], chunk: int
) -> Iterator[tuple[list[Stack], tuple[int, ...], slice]]:
    """The adapters of each chunk, how many are of each stack, and their place among all."""
    for start in range(0, sum(sizes), chunk):
        stop, first = min(start + chunk, sum(sizes)), 0
        share: list[tuple[Stack, int]] = []
        for stack, size in zip(stacks, sizes, strict=True):
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                whole = high - low == size
                cut = stack if whole else {key: leaf[low:high] for key, leaf in stack.items()}
                share.append((cut, high - low))
            first += size
        yield [cut for cut, _ in share], tuple(size for _, size in share), slice(start, stop)


def _run(sweep: Sweep, check: str, fallback: str) -> Any:
    if sweep.size > 1:
        try:
            if check == "first" and not torch.compiler.is_compiling():
                verify(sweep)
            return sweep.together()
        except FoldError:
            if fallback == "raise":
                raise
    return stacked_trees([sweep.alone(k) for k in range(sweep.size)])


def clip_grad_norm(adapters: Stack | Sequence[Stack], max_norm: float) -> Tensor:
    """Scale the gradients of each adapter down to a norm, adapter by adapter.

    Args:
        adapters: Adapters whose leaves have gradients, or one stack of them; of several stacks
            each is clipped by a call of its own.
        max_norm: The largest norm that is left as it is.

    Returns:
        The norms before, shape (K,). One that is not finite concerns its adapter alone.

    Example:
        >>> import torch, lora_func as lf
        >>> model, x = torch.nn.Linear(4, 2), torch.ones(5, 4)
        >>> adapters = [lf.init(model, lf.LoRA(r=2), seed=seed) for seed in range(3)]
        >>> losses = lf.vcall(model, lf.stack(adapters), x, loss_fn=lambda y, x: y.square().sum())
        >>> losses.sum().backward()
        >>> norms = lf.clip_grad_norm(adapters, max_norm=1.0)
    """
    check_number("max_norm", max_norm, above=0)
    if not isinstance(adapters, Mapping):
        each = [partition(adapter)[0].values() for adapter in adapters]
        return torch.stack([torch.nn.utils.clip_grad_norm_(leaves, max_norm) for leaves in each])
    gradients = [leaf.grad for leaf in adapters.values() if leaf.grad is not None]
    of_each = [torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in gradients]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(of_each), dim=0)
    for gradient in gradients:
        shape = (-1, *[1] * (gradient.ndim - 1))
        gradient.mul_((max_norm / (norms + 1e-6)).clamp(max=1).view(shape))
    return norms
