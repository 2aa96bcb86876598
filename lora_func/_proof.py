"""Running adapters folded into the rows of a batch, and the proof that a model lets them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_func._call import fcall
from lora_func._errors import FoldError
from lora_func._fold import batch_of, fold_batch, of_adapter, refuse_mixed, unfold
from lora_func._inject import Injection, injection
from lora_func._keys import parse
from lora_func._losses import CompiledLossesApart
from lora_func._modules import uncompiled
from lora_func._plan import Plan, plan_of
from lora_func._rows import Rows
from lora_func._sites import frozen_parameters, shared_parameters
from lora_func._slots import Put
from lora_func._transforms import active_transforms

Stacks = Sequence[Mapping[str, Tensor]]


def fold(
    model: nn.Module,
    stacks: Stacks,
    sizes: tuple[int, ...],
    batch: Any,
    batched: bool,
    strict: bool,
) -> Any:
    """Run a model once on the rows of all adapters.

    Args:
        model: The model.
        stacks: The adapters.
        sizes: The number of adapters in each stack.
        batch: As for ``vcall``.
        batched: Whether each adapter has its own.
        strict: As for ``fcall``.

    Returns:
        What the model gives, its loss as one for each adapter.

    Raises:
        FoldError: If the adapters cannot share a call.
    """
    count = sum(sizes)
    args, kwargs, rows = fold_batch(batch, count, batched)
    work = injection(model, stacks, Rows(sizes, rows))
    for plan in work.plans:
        _refuse_unfoldable(uncompiled(model), plan)
    compiling = torch.compiler.is_compiling()
    with work.inside(), CompiledLossesApart(count) if compiling else nullcontext():
        output = work.call(args, kwargs)
    _refuse_unread(work)
    if strict:
        work.refuse_unused()
    refuse_mixed(output, count)
    return output


def require_proof(
    model: nn.Module,
    stacks: Stacks,
    sizes: tuple[int, ...],
    batch: Any,
    batched: bool,
    strict: bool,
) -> None:
    """Compare the first fold of a layout with solo runs; later ones take its verdict.

    Args:
        model: The model.
        stacks: The adapters; only their shapes matter.
        sizes: The number of adapters in each stack.
        batch: As for ``vcall``.
        batched: Whether each adapter has its own.
        strict: As for ``fcall``.

    Raises:
        FoldError: If a fold gives other numbers than solo runs.
        RuntimeError: If the comparison would have to be made inside ``torch.vmap``.
    """
    verdicts = plan_of(uncompiled(model), stacks[0]).folds
    layout = (*(tuple(stack) for stack in stacks), batched)
    if layout not in verdicts:
        if "Vmap" in active_transforms():
            raise RuntimeError(
                "vcall: its first fold cannot be checked inside torch.vmap; call it once outside, "
                'or pass check="never"'
            )
        verdicts[layout] = _difference(model, stacks, sizes, batch, batched, strict)
    if verdicts[layout] is not None:
        raise FoldError(verdicts[layout])


def _difference(
    model: nn.Module,
    stacks: Stacks,
    sizes: tuple[int, ...],
    batch: Any,
    batched: bool,
    strict: bool,
) -> str | None:
    """What tells a fold from solo runs, in eval mode and with leaves that are all different."""
    stacks = [_moved(stack) for stack in stacks]
    quiet = ((vars(module), "training", False) for module in uncompiled(model).modules())
    with torch.no_grad(), torch.random.fork_rng(devices=[]), Put(quiet):
        together = unfold(fold(model, stacks, sizes, batch, batched, strict), sum(sizes))
        for k, adapter in _first_and_last(stacks, sizes):
            mine = batch_of(batch, batched, k)
            alone = fcall(model, adapter, mine, loss_fn=lambda output, _: output, strict=strict)
            off = _distance(of_adapter(together, k), alone)
            if off is not None:
                return (
                    f"the model gives adapter {k} another output in a batch with others than alone "
                    f"(off by {off:.1e} of its norm): its rows depend on each other, or on their "
                    'number; if it is only rounding, pass check="never"'
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


def _first_and_last(
    stacks: Stacks, sizes: tuple[int, ...]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    first = 0
    for stack, size in zip(stacks, sizes, strict=True):
        for k in sorted({0, size - 1}):
            yield first + k, {key: leaf[k] for key, leaf in stack.items()}
        first += size


def _distance(ours: Any, theirs: Any) -> float | None:
    """How far two outputs are apart, relative to the second; None if it is rounding."""
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        if not isinstance(b, Tensor) or not b.is_floating_point():
            continue
        off = float((a - b).norm() / b.norm().clamp(min=1e-30))
        if not off <= torch.finfo(b.dtype).eps ** 0.5 and not torch.equal(a, b):
            return off
    return None


def _refuse_unfoldable(model: nn.Module, plan: Plan) -> None:
    for norm in filter(None, (reference() for reference in plan.norms)):
        if norm.training or norm.running_mean is None:
            raise FoldError(
                f"{type(norm).__name__}: its statistics are over the rows of all adapters; call "
                "eval() on it"
            )
    everywhere = [site for site in plan.sites if site.everywhere]
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
