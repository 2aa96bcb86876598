"""The verification that a model keeps the rows of several adapters apart."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lora_func.adapter import parse
from lora_func.compat import (
    active_transforms,
    autocasts,
    tree_flatten,
)
from lora_func.errors import BusyModelError, FoldError, UnusedLeafError
from lora_func.modules import inner_model
from lora_func.runtime import (
    arguments,
    eval_patches,
    largest,
    layout_of,
    patched,
    remember,
    tensors_of,
)
from lora_func.sweep._batching import copied, of_adapter, rows_of
from lora_func.sweep._comparison import difference
from lora_func.sweep._fold import Sweep
from lora_func.weights import packed, without_rounding


def verify(sweep: Sweep) -> None:
    """Compare the first fold of each kind with solo runs; later folds of the kind are trusted.

    A refusal is not kept: its cause may be removed.

    Args:
        sweep: The adapters and the batch.

    Raises:
        FoldError: If a fold gives other numbers than solo runs.
        RuntimeError: If the comparison would have to run inside ``torch.vmap``.
    """
    verdicts = layout_of(inner_model(sweep.model), sweep.stacks[0]).verdicts
    rows = rows_of(sweep.batch, sweep.batched)
    kind = (*map(frozenset, sweep.stacks), sweep.sizes, rows, sweep.batched, _kind(sweep.batch))
    known = sweep.size == 1 or kind in verdicts
    (passes,) = largest(sweep.model, [0 if known else 1 + len(_ends(sweep.sizes))])
    if known:
        _pass(sweep, passes)
        return
    if "Vmap" in active_transforms():
        raise RuntimeError(
            "vcall: its first fold cannot be checked inside torch.vmap; call it once outside, "
            'or pass check="never"'
        )
    _compare(sweep, passes)
    remember(verdicts, kind, True)


def _kind(batch: Any) -> tuple[Any, ...]:
    """The structure of a batch and the kinds of its values, without the values of numbers."""
    values, layout = tree_flatten(arguments(batch))
    return str(layout), *map(_kind_of_value, values)


def _kind_of_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.ndim
    # flags and names choose a computation, numbers as a rule do not
    return value if isinstance(value, (bool, str)) else type(value)


def _ends(sizes: Sequence[int]) -> list[int]:
    """The first and the last adapter of each stack."""
    ends = [*accumulate(sizes)]
    firsts = [end - size for end, size in zip(ends, sizes, strict=True)]
    return sorted({*firsts, *(end - 1 for end in ends)})


def _pass(sweep: Sweep, passes: int) -> None:
    """Take part in the forward passes of other ranks."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for _ in range(passes):
            sweep._replace(batch=copied(sweep.batch)).alone(0)


def _compare(sweep: Sweep, passes: int) -> None:
    """Compare a fold with solo runs, in eval mode and with leaves that are all different.

    Raises:
        FoldError: If the outputs differ, or the model fails on the rows of several adapters.
    """
    sweep = sweep._replace(
        stacks=[_perturbed(stack) for stack in sweep.stacks],
        loss_fn=None if sweep.loss_fn is None else lambda output, _: output,
        origin=object(),
    )
    ends = _ends(sweep.sizes)
    precision = _precision(sweep)
    eval_mode = patched(eval_patches(inner_model(sweep.model), sweep.origin))
    # a rounding to 8 bits that goes the other way would hide, or feign, a difference
    with torch.no_grad(), torch.random.fork_rng(devices=[]), without_rounding(), eval_mode:
        together = _together(sweep)
        for k in ends:
            alone = sweep._replace(batch=copied(sweep.batch)).alone(k)
            off = difference(of_adapter(together, k), alone, precision)
            if off is not None:
                raise FoldError(
                    f"the model gives adapter {k} another output in a batch with others than alone "
                    f"({off}): its rows depend on each other, or on their number; if it is only "
                    'rounding, pass check="never"'
                )
    _pass(sweep, passes - 1 - len(ends))


def _together(sweep: Sweep) -> Any:
    """Fold; an error that a solo run does not have is a ``FoldError``."""
    try:
        return sweep._replace(batch=copied(sweep.batch)).together()
    except (BusyModelError, FoldError, UnusedLeafError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        sweep._replace(batch=copied(sweep.batch)).alone(0)
        raise FoldError(
            "the model fails on the rows of several adapters and not on those of one: "
            f"{type(error).__name__}: {error}"
        ) from error


def _perturbed(stack: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stack with finite leaves that differ between adapters, without randomness."""

    def perturbed(leaf: Tensor) -> Tensor:
        start = leaf.detach().nan_to_num(0.0, 0.0, 0.0)
        size = start.square().mean().sqrt()
        noise = torch.arange(leaf.numel(), device=leaf.device).mul(78.233).sin().view(leaf.shape)
        return start + (0.2 * size + 0.05 * (size == 0)) * noise.to(leaf.dtype)

    return {key: leaf if parse(key).is_constant else perturbed(leaf) for key, leaf in stack.items()}


def _precision(sweep: Sweep) -> float:
    """The largest epsilon of the dtypes that compute the output."""
    parameters = [*sweep.model.parameters()]
    dtypes = {tensor.dtype for tensor in [*parameters, *tensors_of(sweep.batch)]}
    dtypes |= {torch.get_autocast_dtype(p.device.type) for p in parameters if autocasts(p)}
    quantised = layout_of(inner_model(sweep.model), sweep.stacks[0]).quantised
    dtypes |= {packed(m, path).dtype for path, module in quantised if (m := module()) is not None}
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max((torch.finfo(dtype).eps for dtype in floats), default=0.0)
