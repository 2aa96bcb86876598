"""Sweeps: K adapters in one call of one frozen model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lora_func.adapter._keys import partition
from lora_func.adapter._stack import size_of
from lora_func.checks import check_choice, check_count, check_number
from lora_func.runtime._batch import LossFn
from lora_func.runtime._trees import joined
from lora_func.runtime._trees import stacked as stacked_trees
from lora_func.sweep._batching import batch_of, refuse_other_axes
from lora_func.sweep._verification import Sweep, require_proof

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

    It means ``torch.vmap(fcall, in_dims=(None, 0, None))`` and gives the same numbers, but folds
    the adapters into the rows of the batch: the base runs once on K times the rows, untransformed,
    and only the adapters themselves are batched. So fused attention, padding masks, checkpointing
    and dropout (of its own for each adapter) work as in a plain call.

    The losses are independent: take gradients of their sum, never of their mean.

    Args:
        model: The model. Its rows must not depend on each other.
        stacked: What ``stack`` made; or several stacks, of whatever variants, whose adapters come
            one after another.
        batch: As for ``fcall``, with the rows on the first axis of every tensor; a tensor with one
            row is for all.
        loss_fn: Called as ``loss_fn(output, batch)`` for each adapter, with what the model would
            have given for it alone.
        batched: Whether each adapter has a batch of its own: tensors (K, rows, ...).
        chunk: How many adapters to run at a time, to save memory; None for all.
        check: "first": compare the first call of a model with adapters of these keys and a batch of
            these parts with solo runs, of the first and the last adapter of each stack, in eval
            mode, with random leaves. "never": trust that the model keeps its rows apart, as is
            done while compiling.
        fallback: What to do where the adapters cannot share a call: "raise", or "loop" over them.
        strict: As for ``fcall``.

    Returns:
        For each adapter what ``fcall`` returns for it alone, stacked: losses (K,); outputs with an
        axis K in front where there is neither a loss nor a loss_fn.

    Raises:
        FoldError: If the adapters cannot share a call, because the model mixes rows, reads an
            adapted parameter past its module, or has rows elsewhere than on the first axis.
        RuntimeError: If a first call would have to be checked inside ``torch.vmap``.
        ValueError: If stacked is no stack, chunk is less than 1, or a tensor of a batch for each
            adapter has not K in front.

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
        refuse_other_axes(batch, sum(sizes))
    pieces = []
    for share, of_each, place in _shares(stacks, sizes, chunk or sum(sizes)):
        own = batch_of(batch, batched, place)
        sweep = Sweep(model, share, of_each, own, batched, loss_fn, strict)
        pieces.append(_run(sweep, check, fallback))
    return joined(pieces)


def _shares(
    stacks: Sequence[Stack], sizes: Sequence[int], chunk: int
) -> Iterator[tuple[list[Stack], tuple[int, ...], slice]]:
    """The adapters that run together, how many are of each stack, and their place among all."""
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
                require_proof(sweep)
            return sweep.together()
        except Exception:
            if fallback == "raise":
                raise
    return stacked_trees([sweep.alone(k) for k in range(sweep.size)])


def clip_grad_norm(adapters: Stack | Sequence[Stack], max_norm: float) -> Tensor:
    """Scale the gradients of each adapter down to a norm, each by itself.

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
