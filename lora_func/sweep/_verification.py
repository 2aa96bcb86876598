"""One call for several adapters, and the verification that a model keeps their rows apart."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_func.adapter import parse
from lora_func.compat import (
    active_transforms,
    mixes_rows_in_training,
    tree_flatten,
    uncompiled,
)
from lora_func.errors import BusyModelError, FoldError, UnusedLeafError
from lora_func.modules import original_parameters, shared_parameters
from lora_func.runtime import (
    LossFn,
    ModelLayout,
    Rows,
    Site,
    arguments,
    call,
    check_used,
    eval_patches,
    injection,
    layout_of,
    patched,
    present,
    remember,
    tensors_of,
)
from lora_func.sweep._batching import (
    batch_of,
    copied,
    fold_batch,
    of_adapter,
    results,
    without_caches,
)
from lora_func.sweep._comparison import difference
from lora_func.weights import packed, without_rounding


class Sweep(NamedTuple):
    """Adapters that run together.

    Attributes:
        model: The model.
        stacks: The adapters.
        sizes: The number of adapters in each stack.
        batch: As for ``vcall``.
        batched: Whether each adapter has its own batch.
        loss_fn: As for ``fcall``.
        strict: As for ``fcall``.
        origin: The call that this is a part of, if it is.
    """

    model: nn.Module
    stacks: Sequence[Mapping[str, Tensor]]
    sizes: tuple[int, ...]
    batch: Any
    batched: bool
    loss_fn: LossFn | None
    strict: bool
    origin: object = None

    @property
    def size(self) -> int:
        """The number of adapters."""
        return sum(self.sizes)

    def together(self) -> Any:
        """Run the model once on the rows of all adapters.

        Returns:
            The stacked results that each adapter would give alone.

        Raises:
            FoldError: If the adapters cannot share a call.
        """
        args, kwargs, rows = fold_batch(self.batch, self.size, self.batched)
        injected = injection(self.model, self.stacks, Rows(self.sizes, rows), origin=self.origin)
        _check_foldable(uncompiled(self.model), injected.layouts)
        with injected.inside():
            output = injected.call(args, kwargs)
        if self.strict:
            check_used(injected.unused)
        assert injected.losses is not None
        settings = (self.size, rows, self.batched, self.loss_fn, injected.losses.split)
        return results(output, self.batch, *settings)

    def alone(self, k: int) -> Any:
        """Return what ``fcall`` returns for one adapter."""
        batch = batch_of(self.batch, self.batched, k)
        return call(self.model, self.adapter(k), batch, self.loss_fn, self.strict, self.origin)

    def adapter(self, k: int) -> dict[str, Tensor]:
        """Return one of the adapters."""
        for stack, size in zip(self.stacks, self.sizes, strict=True):
            if k < size:
                return {key: leaf[k] for key, leaf in stack.items()}
            k -= size
        raise IndexError(k)


def verify(sweep: Sweep) -> None:
    """Compare the first fold of each kind with solo runs; later folds of the kind are trusted.

    A refusal is not kept: its cause may be removed.

    Args:
        sweep: The adapters and the batch.

    Raises:
        FoldError: If a fold gives other numbers than solo runs.
        RuntimeError: If the comparison would have to run inside ``torch.vmap``.
    """
    verdicts = layout_of(uncompiled(sweep.model), sweep.stacks[0]).verdicts
    kind = (*map(frozenset, sweep.stacks), sweep.batched, _kind(sweep.batch))
    if kind in verdicts:
        return
    if "Vmap" in active_transforms():
        raise RuntimeError(
            "vcall: its first fold cannot be checked inside torch.vmap; call it once outside, "
            'or pass check="never"'
        )
    _compare(sweep)
    remember(verdicts, kind, True)


def _kind(batch: Any) -> tuple[Any, ...]:
    """The structure of a batch and the kinds of its values, without the values of numbers."""
    values, layout = tree_flatten(arguments(batch))
    return str(layout), *map(_kind_of_value, values)


def _kind_of_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.ndim
    # flags and names choose another computation, numbers as a rule do not
    return value if isinstance(value, (bool, str, type(None))) else type(value)


def _compare(sweep: Sweep) -> None:
    """Compare a fold with solo runs, in eval mode and with leaves that are all different.

    Raises:
        FoldError: If the outputs differ, or the model fails on the rows of several adapters.
    """
    sweep = sweep._replace(
        stacks=[_perturbed(stack) for stack in sweep.stacks],
        loss_fn=None if sweep.loss_fn is None else lambda output, _: output,
        origin=object(),
    )
    ends = [*accumulate(sweep.sizes)]
    firsts = [end - size for end, size in zip(ends, sweep.sizes, strict=True)]
    precision = _precision(sweep)
    eval_mode = patched(eval_patches(uncompiled(sweep.model), sweep.origin))
    # a rounding to 8 bits that goes the other way would hide, or feign, a difference
    with torch.no_grad(), torch.random.fork_rng(devices=[]), without_rounding(), eval_mode:
        together = _together(sweep)
        for k in sorted({*firsts, *(end - 1 for end in ends)}):
            alone = sweep._replace(batch=copied(sweep.batch)).alone(k)
            off = difference(of_adapter(together, k), without_caches(alone), precision)
            if off is not None:
                raise FoldError(
                    f"the model gives adapter {k} another output in a batch with others than alone "
                    f"({off}): its rows depend on each other, or on their number; if it is only "
                    'rounding, pass check="never"'
                )


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
    dtypes = {parameter.dtype for parameter in sweep.model.parameters()}
    dtypes |= {tensor.dtype for tensor in tensors_of(sweep.batch)}
    for kind in {parameter.device.type for parameter in sweep.model.parameters()}:
        if torch.is_autocast_enabled(kind):
            dtypes.add(torch.get_autocast_dtype(kind))
    quantised = layout_of(uncompiled(sweep.model), sweep.stacks[0]).quantised
    dtypes |= {packed(m, path).dtype for path, module in quantised if (m := module()) is not None}
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max((torch.finfo(dtype).eps for dtype in floats), default=0.0)


def _check_foldable(model: nn.Module, layouts: Sequence[ModelLayout]) -> None:
    for norm in present(layouts[0].norms):
        own = getattr(norm, "running_mean", None) is not None
        if (norm.training and own) or (mixes_rows_in_training(norm) and not own):
            raise FoldError(
                f"{type(norm).__name__}: its statistics are over the rows of all adapters; call "
                "eval() on it"
            )
    sites = [site for layout in layouts for site in layout.sites]
    everywhere = [site for site in sites if site.everywhere]
    places = shared_parameters(model) if everywhere else {}
    for site in everywhere:
        _check_place(site, places, sites)


def _check_place(site: Site, places: Mapping[int, Sequence[Any]], sites: Sequence[Site]) -> None:
    """Check that a replaced parameter is read only while its own module runs alone."""
    module, own = site.module, original_parameters(site.module)
    names = [*site.keys] if site.parameter is None else [site.parameter]
    if isinstance(module, _READ_FROM_OUTSIDE) or any(
        len(places.get(id(own[name]), ())) > 1 for name in names
    ):
        raise FoldError(
            f"{site.path}: other modules read this parameter as well, or torch's attention "
            'does; leave it out, or pass fallback="loop"'
        )
    inside = {id(child) for child in module.modules()} - {id(module)}
    adapted = [other.path for other in sites if id(other.module) in inside]
    if adapted:
        path = ".".join(filter(None, (site.path, names[0])))
        raise FoldError(
            f"{path}: its module runs other adapted modules, such as {adapted[0]!r}, and cannot "
            'run them adapter by adapter; leave it out, or pass fallback="loop"'
        )


_READ_FROM_OUTSIDE = (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)
