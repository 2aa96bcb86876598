"""K adapters in one call, or one by one; and what cannot share a call."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_func.compat import mixes_rows_in_training
from lora_func.errors import FoldError
from lora_func.modules import Place, inner_model, shared_parameters
from lora_func.runtime import (
    LossFn,
    ModelLayout,
    Rows,
    Site,
    call,
    check_used,
    injection,
    present,
)
from lora_func.sweep._batching import batch_of, fold_batch, results


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
        own = Rows(self.sizes, rows)
        injected = injection(self.model, self.stacks, own, prepares=True, origin=self.origin)
        _check_foldable(inner_model(self.model), injected.layouts)
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


def _check_place(
    site: Site, places: Mapping[Place, Sequence[Place]], sites: Sequence[Site]
) -> None:
    """Check that a replaced parameter is read only while its own module runs alone."""
    module = site.module
    names = [*site.keys] if site.parameter is None else [site.parameter]
    if isinstance(module, _READ_FROM_OUTSIDE) or any(
        len(places.get((module, name), ())) > 1 for name in names
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
