"""The calibration pass: the frozen model runs over data, and variants gather statistics."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_func.compat import version_of
from lora_func.configs import AdapterConfig
from lora_func.initialization._padding import last_rows, masks_of, real_rows, rows_of
from lora_func.runtime import (
    ForwardOverride,
    LossFn,
    Patch,
    arguments,
    eval_patches,
    has_fast_path,
    override_forward,
    patched,
    result,
    settings_now,
)
from lora_func.variant import ObserveFn
from lora_func.weights import is_quantised

Watch: TypeAlias = Callable[[str, Tensor, Tensor], Tensor | None]
"""Called as ``watch(site, x, y)`` after a site has run; its result, if any, replaces y."""


class Observer(NamedTuple):
    """How a site gathers statistics.

    Attributes:
        observe: Adds to the statistics of the site.
        cfg: The config as the user gave it.
    """

    observe: ObserveFn
    cfg: AdapterConfig


def calibrate(
    model: nn.Module,
    observers: Mapping[str, Observer],
    data: Iterable[Any],
    loss_fn: LossFn | None,
) -> dict[str, Any]:
    """Run the frozen model over data, in eval mode, and gather the statistics of each site.

    The model is afterwards what it was, whatever happens. No activation is kept from one batch to
    the next. Sites with the same input tensor share one computation and its result.

    Args:
        model: The model.
        observers: Site -> its observer, all of one kind of calibration.
        data: Batches as for ``fcall``; for "pairs" tuples (positive, negative) of them.
        loss_fn: As for ``fcall``, if gradients are needed.

    Returns:
        Site -> statistics.

    Raises:
        TypeError: If data is a single batch, a batch has another type, or a call gives no loss
            and one is needed.
        BusyModelError: If the model is running with an adapter.
        ValueError: If there is no batch, padding is ambiguous, pairs do not match, or a site saw
            no data.
    """
    if isinstance(data, (Mapping, Tensor)) or not isinstance(data, Iterable):
        raise TypeError(f"data: got one {type(data).__name__}, expected an iterable of batches")
    (kind,) = {observer.cfg.calibration for observer in observers.values()}
    gather = _Gather(model, observers)
    runs: dict[str | None, Callable[[_Gather, Any], None]] = {
        "inputs": _inputs,
        "gradients": partial(_gradients, loss_fn),
        "pairs": _pairs,
    }
    batches = 0
    eager = torch.compiler.set_stance("force_eager")
    patches = chain(settings_now(has_fast_path(model)), eval_patches(model, object()))
    with eager, patched(patches):
        for batch in tqdm(data, "calibrate", unit="batch", disable=None):
            runs[kind](gather, batch)
            gather.forget()
            batches += 1
    for site, statistics in gather.statistics.items():
        if statistics is None:
            raise ValueError(
                f"{site}: saw nothing of {batches} batches: there is none, the layer did not run, "
                "or the loss does not depend on it; pass other data, or leave the site out"
            )
    return gather.statistics


class _Gather:
    """The statistics so far.

    The results for the last input tensor are remembered: a site with the same statistics and the
    same input as another site gets the same result.
    """

    def __init__(self, model: nn.Module, observers: Mapping[str, Observer]) -> None:
        self.model = model
        self.observers = observers
        self.statistics: dict[str, Any] = dict.fromkeys(observers)
        self._seen: tuple[Tensor | None, int]
        self._results: dict[tuple[Any, ...], tuple[Any, Any]]
        self.forget()

    def forget(self) -> None:
        """Forget the last input tensor."""
        self._seen, self._results = (None, 0), {}

    def add(self, site: str, x: Tensor, gy: Tensor | None = None) -> None:
        """Give a site rows of its input, and of the gradient of its output."""
        observe, cfg = self.observers[site]
        self.statistics[site] = observe(cfg, self.statistics[site], x, gy)

    def add_shared(self, site: str, masks: Mapping[str, Tensor], x: Tensor) -> None:
        """Give a site its input (..., d_in), which other sites may share."""
        seen, version = self._seen
        if x is not seen or version_of(x) != version:
            self._seen, self._results = (x, version_of(x)), {}
        before = self.statistics[site]
        key = (*map(id, self.observers[site]), id(before))
        if key not in self._results:
            self.add(site, real_rows(x, rows_of(site, masks, x)))
            # the old statistics are kept, so that their id is not used again
            self._results[key] = before, self.statistics[site]
        _, self.statistics[site] = self._results[key]

    def call(self, batch: Any, watch: Watch) -> Any:
        """Run the model, and call ``watch`` at every site."""
        args, kwargs = arguments(batch)
        with patched(self._patches(watch)):
            return self.model(*args, **kwargs)

    def _patches(self, watch: Watch) -> Iterator[Patch]:
        for path, module in self.model.named_modules():
            if path in self.observers:
                yield override_forward(module, path, _WatchedForward, watch)
            elif is_quantised(module):
                yield override_forward(module, path, ForwardOverride)


@dataclass(slots=True, eq=False, repr=False)
class _WatchedForward(ForwardOverride):
    watch: Watch

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())
        y: Tensor = self.base(x)
        with torch.autocast(x.device.type, enabled=False):
            replaced = self.watch(self.path, x, y)
        return y if replaced is None else replaced


def _inputs(gather: _Gather, batch: Any) -> None:
    masks = masks_of(gather.model, batch)
    with torch.no_grad():
        gather.call(batch, lambda site, x, y: gather.add_shared(site, masks, x))


def _gradients(loss_fn: LossFn | None, gather: _Gather, batch: Any) -> None:
    seen: list[tuple[str, Tensor, int, Tensor]] = []

    def watch(site: str, x: Tensor, y: Tensor) -> Tensor:
        # with a frozen base nothing requires grad before the first site
        output = y if y.requires_grad else y.detach().requires_grad_()
        seen.append((site, x.detach(), version_of(x), output))
        return output.clone()

    with torch.enable_grad():
        loss = result(gather.call(batch, watch), batch, loss_fn)
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            f"data: gradients need a scalar loss that depends on the sites, the call gave {found}; "
            "put labels into the batches, or pass loss_fn"
        )
    outputs = [output for *_, output in seen]
    gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
    masks = masks_of(gather.model, batch)
    for (site, x, version, _), gradient in zip(seen, gradients, strict=True):
        if version_of(x) != version:
            raise ValueError(
                f"{site}: its input was overwritten in place after it ran, so the gradient of its "
                "weight cannot be formed; leave the site out"
            )
        if gradient is not None:
            mask = rows_of(site, masks, x)
            with torch.autocast(x.device.type, enabled=False):
                gather.add(site, real_rows(x, mask), real_rows(gradient, mask))


def _pairs(gather: _Gather, batch: Any) -> None:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(
            f"data: got {type(batch).__name__}, expected pairs (positive batch, negative batch)"
        )
    positive, negative = (_last_tokens(gather, side) for side in batch)
    if positive.keys() != negative.keys():
        site = min(positive.keys() ^ negative.keys())
        raise ValueError(f"{site}: ran on one side of a pair only; leave it out")
    for site, rows in positive.items():
        if rows.shape != negative[site].shape:
            raise ValueError(
                f"{site}: {len(rows)} positive rows, {len(negative[site])} negative ones; row i of "
                "one belongs to row i of the other"
            )
        gather.add(site, torch.stack([rows, negative[site]]))


def _last_tokens(gather: _Gather, batch: Any) -> dict[str, Tensor]:
    masks, rows = masks_of(gather.model, batch), defaultdict(list)

    def watch(site: str, x: Tensor, y: Tensor) -> None:
        rows[site].append(last_rows(site, x, rows_of(site, masks, x)))

    with torch.no_grad():
        gather.call(batch, watch)
    return {site: torch.cat(found) for site, found in rows.items()}
