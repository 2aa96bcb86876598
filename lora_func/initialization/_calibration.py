"""The calibration pass: the frozen model runs over data while variants look on."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_func.configs import AdapterConfig
from lora_func.initialization._padding import last_rows, masks_of, real_rows, rows_of
from lora_func.runtime._batch import LossFn, arguments, result
from lora_func.runtime._frozen import OtherForward, other_forward
from lora_func.runtime._patches import Put, Slot
from lora_func.runtime._running import quiet_slots
from lora_func.runtime._transforms import has_fast_path, held, settings_now
from lora_func.variant import ObserveFn
from lora_func.weights._bitsandbytes import is_quantised

See: TypeAlias = Callable[[str, Tensor, Tensor], Tensor | None]
"""Called as ``see(site, x, y)`` when a site has run; what it returns replaces y."""


class Observer(NamedTuple):
    """What a site wants to know of the data.

    Attributes:
        observe: Adds to its statistics.
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

    Nothing is left behind in the model, whatever happens, and no activation is kept from one batch
    to the next. Sites that see the same tensor share one computation and its result.

    Args:
        model: The model.
        observers: Site -> what it wants to know, all of one kind of calibration.
        data: Batches as for ``fcall``; for "pairs" tuples (positive, negative) of them.
        loss_fn: As for ``fcall``, where gradients are asked for.

    Returns:
        Site -> statistics.

    Raises:
        TypeError: If data is a single batch, a batch is of another kind, or a call gives no loss
            where one is needed.
        BusyModelError: If the model is running with an adapter.
        ValueError: If there is no batch, padding cannot be told, pairs do not match, or a site saw
            nothing.
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
    with held(settings_now(has_fast_path(model))), eager, Put(quiet_slots(model, object())):
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

    The results for the tensor seen last are remembered: a site that has the same statistics as
    another and now sees the same tensor gets the same result.
    """

    def __init__(self, model: nn.Module, observers: Mapping[str, Observer]) -> None:
        self.model = model
        self.observers = observers
        self.statistics: dict[str, Any] = dict.fromkeys(observers)
        self._seen: tuple[Tensor | None, int]
        self._results: dict[tuple[Any, ...], tuple[Any, Any]]
        self.forget()

    def forget(self) -> None:
        """Let go of the tensor seen last."""
        self._seen, self._results = (None, 0), {}

    def add(self, site: str, x: Tensor, gy: Tensor | None = None) -> None:
        """Show a site rows of its input, and of the gradient of its output."""
        observe, cfg = self.observers[site]
        self.statistics[site] = observe(cfg, self.statistics[site], x, gy)

    def add_shared(self, site: str, masks: Mapping[str, Tensor], x: Tensor) -> None:
        """Show a site its input (..., d_in), which other sites may see as well."""
        seen, version = self._seen
        if x is not seen or _version(x) != version:
            self._seen, self._results = (x, _version(x)), {}
        before = self.statistics[site]
        key = (*map(id, self.observers[site]), id(before))
        if key not in self._results:
            self.add(site, real_rows(x, rows_of(site, masks, x)))
            # the old statistics too, so that their id stays theirs
            self._results[key] = before, self.statistics[site]
        _, self.statistics[site] = self._results[key]

    def call(self, batch: Any, see: See) -> Any:
        """Run the model while ``see`` looks at every site."""
        args, kwargs = arguments(batch)
        with Put(self._slots(see)):
            return self.model(*args, **kwargs)

    def _slots(self, see: See) -> Iterator[Slot]:
        for path, module in self.model.named_modules():
            if path in self.observers:
                yield other_forward(module, path, _Watching, path, see)
            elif is_quantised(module):
                yield other_forward(module, path, OtherForward)


@dataclass(slots=True, eq=False, repr=False)
class _Watching(OtherForward):
    site: str
    see: See

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())
        y: Tensor = self.base(x)
        with torch.autocast(x.device.type, enabled=False):
            replaced = self.see(self.site, x, y)
        return y if replaced is None else replaced


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _inputs(gather: _Gather, batch: Any) -> None:
    masks = masks_of(gather.model, batch)
    with torch.no_grad():
        gather.call(batch, lambda site, x, y: gather.add_shared(site, masks, x))


def _gradients(loss_fn: LossFn | None, gather: _Gather, batch: Any) -> None:
    seen: list[tuple[str, Tensor, int, Tensor]] = []

    def watch(site: str, x: Tensor, y: Tensor) -> Tensor:
        # of a frozen base nothing requires grad before the first site
        output = y if y.requires_grad else y.detach().requires_grad_()
        seen.append((site, x.detach(), _version(x), output))
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
        if _version(x) != version:
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
