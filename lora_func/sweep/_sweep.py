"""Sweeps: K adapters in one call of one frozen model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lora_func.adapter import stack
from lora_func.checks import check_choice, check_count
from lora_func.errors import FoldError
from lora_func.runtime import (
    LossFn,
    check_same_depth,
    is_sharded,
    joined,
    largest,
    refused_together,
    stack_size,
)
from lora_func.runtime import stacked as stacked_trees
from lora_func.sweep._agreement import beside
from lora_func.sweep._batching import batch_of, check_batched_axes
from lora_func.sweep._caches import check_no_cache
from lora_func.sweep._clipping import as_list
from lora_func.sweep._fold import Sweep
from lora_func.sweep._spread import is_spread_over_adapters, run_own_part
from lora_func.sweep._verification import verify

Stack: TypeAlias = Mapping[str, Tensor]


def vcall(
    model: nn.Module,
    stacked: Stack | Sequence[Mapping[str, Tensor]],
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
        stacked: A result of ``stack``; or a list of stacks and adapters, of any variants, in the
            order of the results. Adapters with the same keys that follow one another are stacked.
            A stack of DTensors with ``Shard(0)`` runs on each rank the adapters that it has; its
            results are DTensors too.
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
            "loop" over the adapters, which a base that is sharded over ranks does not allow. Other
            errors are always raised.
        strict: As for ``fcall``.

    Returns:
        The stacked results of ``fcall`` for each adapter: losses (K,); outputs with an axis K in
        front if there is neither a loss nor a loss_fn. What is no tensor, such as a cache,
        becomes a list of K values, unless it is a plain value that all have.

    Raises:
        FoldError: If the adapters cannot share a call: the model mixes rows, reads an adapted
            parameter past its module, or has rows on another axis than the first.
        RuntimeError: If a first call would have to be checked inside ``torch.vmap``, or another
            rank of a sharded base refused its call.
        TypeError: If stacked is no mapping and no list of mappings.
        ValueError: If stacked is one adapter, a leaf is missing or has other axes, chunk is less
            than 1, a tensor of a batched batch does not have K in front, or the batch holds a
            cache.

    Examples:
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
    with refused_together(model):
        check_choice("check", check, ("first", "never"))
        check_choice("fallback", fallback, ("raise", "loop"))
        if chunk is not None:
            check_count("chunk", chunk)
        stacks, sizes = _stacks(model, stacked)
        if not sum(sizes):
            raise ValueError("stacked: got no adapter")
        check_no_cache(batch)
        if batched:
            check_batched_axes(batch, sum(sizes))
    sweep = Sweep(model, stacks, tuple(sizes), batch, batched, loss_fn, strict)
    modes = chunk or sum(sizes), check, fallback
    if is_spread_over_adapters(stacks):
        return run_own_part(sweep, lambda own: _run_chunks(own, *modes))
    return _run_chunks(sweep, *modes)


def _run_chunks(sweep: Sweep, chunk: int, check: str, fallback: str) -> Any:
    parts = [
        sweep._replace(
            stacks=share, sizes=of_each, batch=batch_of(sweep.batch, sweep.batched, place)
        )
        for share, of_each, place in _shares(sweep.stacks, sweep.sizes, chunk)
    ]
    check_same_depth(sweep.model, sweep.stacks)
    passes, checks = largest(sweep.model, [len(parts), int(check == "first")])
    check = "first" if checks else "never"
    pieces = [_run(part, check, fallback) for part in parts]
    others = parts[-1]._replace(loss_fn=lambda output, _: output)
    for _ in range(passes - len(parts)):
        with torch.random.fork_rng(devices=[]):
            pieces[-1] = beside(pieces[-1], _run(others, check, fallback))
    return joined(pieces, [part.size for part in parts])


def _stacks(
    model: nn.Module, given: Stack | Sequence[Mapping[str, Tensor]]
) -> tuple[list[Stack], list[int]]:
    """Stacks, with the adapters among them stacked, and their sizes."""
    groups: list[tuple[int | None, list[Mapping[str, Tensor]]]] = []
    for one in as_list(given):
        size = stack_size(model, one)
        last_size, last = groups[-1] if groups else (0, [])
        if size is last_size is None and sorted(one) == sorted(last[0]):
            last.append(one)
        else:
            groups.append((size, [one]))
    if isinstance(given, Mapping) and groups[0][0] is None:
        key, leaf = next(iter(given.items()))
        raise ValueError(
            f"{key}: got shape {tuple(leaf.shape)}, which is that of one adapter; call "
            "vcall(model, stack([params]), batch) or fcall(model, params, batch)"
        )
    stacks = [stack(members) if size is None else members[0] for size, members in groups]
    return stacks, [len(members) if size is None else size for size, members in groups]


def _shares(
    stacks: Sequence[Stack], sizes: Sequence[int], chunk: int
) -> Iterator[tuple[list[Stack], tuple[int, ...], slice]]:
    """The adapters of each chunk, how many are of each stack, and their place among all."""
    for start in range(0, sum(sizes), chunk):
        stop, first = min(start + chunk, sum(sizes)), 0
        share: list[tuple[Stack, int]] = []
        for of_some, size in zip(stacks, sizes, strict=True):
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                whole = high - low == size
                cut = of_some if whole else {key: leaf[low:high] for key, leaf in of_some.items()}
                share.append((cut, high - low))
            first += size
        yield [cut for cut, _ in share], tuple(size for _, size in share), slice(start, stop)


def _run(sweep: Sweep, check: str, fallback: str) -> Any:
    try:
        if check == "first" and not torch.compiler.is_compiling():
            verify(sweep)
        if sweep.size > 1:
            return sweep.together()
    except FoldError:
        if fallback == "raise" or is_sharded(sweep.model):
            raise
    return stacked_trees([sweep.alone(k) for k in range(sweep.size)])
