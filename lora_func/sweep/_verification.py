"""One call for several adapters, and the proof that a model lets them share it."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lora_func.adapter._keys import parse
from lora_func.errors import FoldError
from lora_func.modules import uncompiled
from lora_func.runtime._batch import LossFn, arguments
from lora_func.runtime._call import call
from lora_func.runtime._frozen import frozen_parameters, refuse_unused, shared_parameters
from lora_func.runtime._injection import Injection, injection
from lora_func.runtime._layout import Plan, plan_of
from lora_func.runtime._losses import CompiledLossesApart
from lora_func.runtime._patches import Put
from lora_func.runtime._rows import Rows
from lora_func.runtime._running import quiet_slots
from lora_func.runtime._selection import Selections
from lora_func.runtime._transforms import active_transforms
from lora_func.runtime._trees import tensors_of
from lora_func.sweep._batching import (
    batch_of,
    copied,
    fold_batch,
    of_adapter,
    results,
    without_caches,
)
from lora_func.sweep._comparison import difference
from lora_func.weights._bitsandbytes import packed, unrounded


class Sweep(NamedTuple):
    """Adapters that run together.

    Attributes:
        model: The model.
        stacks: The adapters.
        sizes: The number of adapters in each stack.
        batch: As for ``vcall``.
        batched: Whether each adapter has its own.
        loss_fn: As for ``fcall``.
        strict: As for ``fcall``.
        origin: The run that this is a part of, if it is.
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
            What each adapter would give alone, stacked.

        Raises:
            FoldError: If the adapters cannot share a call.
        """
        args, kwargs, rows = fold_batch(self.batch, self.size, self.batched)
        work = injection(self.model, self.stacks, Rows(self.sizes, rows), origin=self.origin)
        _refuse_unfoldable(uncompiled(self.model), work.plans)
        compiling = torch.compiler.is_compiling()
        with work.inside(), CompiledLossesApart(self.size) if compiling else nullcontext():
            output = work.call(args, kwargs)
        _refuse_unread(work)
        if self.strict:
            refuse_unused(work.unused)
        return results(output, self.batch, self.size, rows, self.batched, self.loss_fn)

    def alone(self, k: int) -> Any:
        """Return what ``fcall`` returns for one of them."""
        batch = batch_of(self.batch, self.batched, k)
        return call(self.model, self.adapter(k), batch, self.loss_fn, self.strict, self.origin)

    def adapter(self, k: int) -> dict[str, Tensor]:
        """Return one of the adapters."""
        for stack, size in zip(self.stacks, self.sizes, strict=True):
            if k < size:
                return {key: leaf[k] for key, leaf in stack.items()}
            k -= size
        raise IndexError(k)


def require_proof(sweep: Sweep) -> None:
    """Compare the first fold of a layout with solo runs; later ones take its verdict.

    Args:
        sweep: The adapters and the batch; of both only what they are made of matters.

    Raises:
        FoldError: If a fold gives other numbers than solo runs.
        RuntimeError: If the comparison would have to be made inside ``torch.vmap``.
    """
    verdicts = plan_of(uncompiled(sweep.model), sweep.stacks[0]).folds
    layout = (*(tuple(stack) for stack in sweep.stacks), sweep.batched, _kind(sweep.batch))
    if layout not in verdicts:
        if "Vmap" in active_transforms():
            raise RuntimeError(
                "vcall: its first fold cannot be checked inside torch.vmap; call it once outside, "
                'or pass check="never"'
            )
        verdicts[layout] = _difference(sweep)
    if verdicts[layout] is not None:
        raise FoldError(verdicts[layout])


def _kind(batch: Any) -> tuple[Any, ...]:
    """What a batch is made of, but for the number of its rows and what is in them."""
    values, layout = tree_flatten(arguments(batch))
    return str(layout), *(
        (value.dtype, value.ndim) if isinstance(value, Tensor) else repr(value) for value in values
    )


def _difference(sweep: Sweep) -> str | None:
    """What tells a fold from solo runs, in eval mode and with leaves that are all different."""
    sweep = sweep._replace(
        stacks=[_moved(stack) for stack in sweep.stacks],
        loss_fn=None if sweep.loss_fn is None else lambda output, _: output,
        origin=object(),
    )
    ends = [*accumulate(sweep.sizes)]
    firsts = [end - size for end, size in zip(ends, sweep.sizes, strict=True)]
    precision = _precision(sweep)
    quiet = Put(quiet_slots(uncompiled(sweep.model), sweep.origin))
    # a rounding to 8 bits that falls the other way would hide, or feign, a difference
    with torch.no_grad(), torch.random.fork_rng(devices=[]), unrounded(), quiet:
        with Selections():  # type: ignore[no-untyped-call]
            together = sweep._replace(batch=copied(sweep.batch)).together()
        for k in sorted({*firsts, *(end - 1 for end in ends)}):
            alone = sweep._replace(batch=copied(sweep.batch)).alone(k)
            off = difference(of_adapter(together, k), without_caches(alone), precision)
            if off is not None:
                return (
                    f"the model gives adapter {k} another output in a batch with others than alone "
                    f"({off}): its rows depend on each other, or on their number; if it is only "
                    'rounding, pass check="never"'
                )
    return None


def _moved(stack: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same stack with finite leaves that are different for each adapter, without randomness."""

    def moved(leaf: Tensor) -> Tensor:
        start = leaf.detach().nan_to_num(0.0, 0.0, 0.0)
        size = start.square().mean().sqrt()
        noise = torch.arange(leaf.numel(), device=leaf.device).mul(78.233).sin().view(leaf.shape)
        return start + (0.2 * size + 0.05 * (size == 0)) * noise.to(leaf.dtype)

    return {key: leaf if parse(key).is_constant else moved(leaf) for key, leaf in stack.items()}


def _precision(sweep: Sweep) -> float:
    """The coarsest epsilon that something is computed with."""
    dtypes = {parameter.dtype for parameter in sweep.model.parameters()}
    dtypes |= {tensor.dtype for tensor in tensors_of(sweep.batch)}
    for kind in {parameter.device.type for parameter in sweep.model.parameters()}:
        if torch.is_autocast_enabled(kind):
            dtypes.add(torch.get_autocast_dtype(kind))
    quantised = plan_of(uncompiled(sweep.model), sweep.stacks[0]).quantised
    dtypes |= {packed(m, path).dtype for path, module in quantised if (m := module()) is not None}
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max((torch.finfo(dtype).eps for dtype in floats), default=0.0)


def _refuse_unfoldable(model: nn.Module, plans: Sequence[Plan]) -> None:
    for norm in filter(None, (reference() for reference in plans[0].norms)):
        if norm.training or norm.running_mean is None:
            raise FoldError(
                f"{type(norm).__name__}: its statistics are over the rows of all adapters; call "
                "eval() on it"
            )
    everywhere = [site for plan in plans for site in plan.sites if site.everywhere]
    places = shared_parameters(model) if everywhere else {}
    for site in everywhere:
        module = site.module()
        assert module is not None
        own = frozen_parameters(module)
        names = [*site.keys] if site.parameter is None else [site.parameter]
        if isinstance(module, _READ_FROM_OUTSIDE) or any(
            len(places.get(id(own[name]), ())) > 1 for name in names
        ):
            raise FoldError(
                f"{site.path}: other modules read this parameter as well, or torch's attention "
                'does; leave it out, or pass fallback="loop"'
            )


def _refuse_unread(work: Injection) -> None:
    for plan, unused in zip(work.plans, work.unused, strict=True):
        for site in plan.sites:
            if site.everywhere and unused and not unused.isdisjoint(site.keys.values()):
                raise FoldError(
                    f"{site.path}: the model reads this parameter past its module; leave it out, "
                    'or pass fallback="loop"'
                )


_READ_FROM_OUTSIDE = (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)
