"""K adapters in one call: the rows of the batch belong to one adapter after another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from lora_func.compat import tree_flatten, tree_unflatten
from lora_func.errors import FoldError
from lora_func.modules import is_spread
from lora_func.runtime._leaves import AdapterLeaves, SiteLeaves
from lora_func.runtime._losses import PausedMode, Rows
from lora_func.runtime._overrides import CallState, Forward, ForwardOverride, adapted_tensor
from lora_func.runtime._site import Site, runs_apply
from lora_func.runtime._sites import adapter_names, run_apply, run_base, run_sites
from lora_func.runtime._trees import joined, tensors_of
from lora_func.weights import mixes_rows


class Part(NamedTuple):
    """What one stack does at a module.

    Attributes:
        size: The number of its adapters.
        sites: Its sites there; empty if it leaves the module unchanged.
        leaves: The leaves of the stack; tensors (size, ...).
        unused: The keys of the stack that nothing has used.
    """

    size: int
    sites: Sequence[Site]
    leaves: AdapterLeaves
    unused: set[str] | None


@dataclass(slots=True, eq=False, repr=False)
class StackedForward(ForwardOverride):
    """Runs a module that several adapters share; all its arguments have rows on the first axis.

    Attributes:
        rows: Which rows belong to which adapter.
        parts: What each stack does there.
        call: The call.
    """

    rows: Rows
    parts: Sequence[Part]
    call: CallState

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.call.live:
            return self.original(*args, **kwargs)
        try:
            with PausedMode(self.call.losses):
                return self._run(args, kwargs)
        except Exception as error:
            error.add_note(f"in the {adapter_names(s for part in self.parts for s in part.sites)}")
            raise

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (part, *others), module = self.parts, self.module
        single = not others and not kwargs and len(args) == 1 and isinstance(args[0], Tensor)
        if not single or args[0].ndim < 2 or not _takes_stack(part, module):
            return self._run_parts(*tree_flatten((args, kwargs)))
        _rows_of_one(self.path, args, self.rows)
        return _run_stack(part, module, args[0])

    def _run_parts(self, values: list[Any], layout: Any) -> Any:
        places = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.ndim]
        share = _rows_of_one(self.path, [values[i] for i in places], self.rows)
        sizes = [part.size * share for part in self.parts]
        pieces = {i: values[i].split(sizes) for i in places} if len(self.parts) > 1 else {}
        outputs = []
        for j, part in enumerate(self.parts):
            mine = [pieces[i][j] if i in pieces else value for i, value in enumerate(values)]
            outputs.append(_run_part(self.path, part, self.module, self.base, share, mine, layout))
        return _joined(outputs)

    def adapt(self, name: str, stored: Any) -> Any:
        """Refuse code outside the module that computes with an adapted parameter."""
        if is_spread(stored) and id(self.module) in self.call.sharding.gathered:
            return stored  # FSDP2 reads its own shard
        sites = [site for part in self.parts for site in part.sites]
        changes = self.call.live and any(name in site.changed_names for site in sites)
        return adapted_tensor(stored, self._refuse) if changes else stored

    def _refuse(self) -> NoReturn:
        raise FoldError(
            f"{self.path}: the model reads this parameter past its module, where the rows of all "
            'adapters are together; leave it out, or pass fallback="loop"'
        )


@dataclass(slots=True, eq=False, repr=False)
class PassThrough(ForwardOverride):
    """Runs a quantised module that several adapters share and none changes.

    Attributes:
        rows: Which rows belong to which adapter.
    """

    rows: Rows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        (x,) = (*args, *kwargs.values())
        adapters = self.rows.adapters
        shared = not x.ndim or x.shape[0] % max(adapters * self.rows.batch, 1)
        if shared or not mixes_rows(self.module, self.path):
            return self.base(x)
        return torch.vmap(self.base)(x.unflatten(0, (adapters, -1))).flatten(0, 1)


def _rows_of_one(path: str, tensors: Sequence[Tensor], rows: Rows) -> int:
    counts = {tensor.shape[0] for tensor in tensors}
    count = next(iter(counts), 1)
    if len(counts) != 1 or count % max(rows.adapters * rows.batch, 1):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise FoldError(
            f"{path}: its inputs have shapes {shapes}; to be shared by {rows.adapters} adapters of "
            f"{rows.batch} rows, each must have a multiple of {rows.adapters * rows.batch} rows on "
            "its first axis"
        )
    return count // rows.adapters


def _run_part(
    path: str,
    part: Part,
    module: nn.Module,
    base: Forward,
    share: int,
    values: list[Any],
    layout: Any,
) -> Any:
    mixed = mixes_rows(module, path)
    if not part.sites and not mixed:
        args, kwargs = tree_unflatten(values, layout)
        return run_base(module, base, *args, **kwargs)
    if part.unused is not None:
        part.unused.difference_update(*(site.known for site in part.sites))

    def one(adapter: Sequence[Mapping[str, Tensor]], x: Tensor) -> Any:
        if not part.sites:
            return run_base(module, base, x)
        return run_apply(part.sites, module, [SiteLeaves(own, own, None) for own in adapter], x)

    if not part.sites or runs_apply(part.sites, module):
        (x,) = values
        if x.ndim > 1 and part.sites and _takes_stack(part, module):
            return _run_stack(part, module, x)
        leaves, rows = (
            [own.raw for own in part.leaves.at(part.sites)],
            x.unflatten(0, (part.size, share)),
        )
        y = torch.vmap(one, randomness="different")(leaves, rows)
        assert isinstance(y, Tensor)
        return y.flatten(0, 1)
    each = [own.unstacked() for own in part.leaves.at(part.sites)]
    outputs = []
    for k, leaves_of_k in enumerate(zip(*each, strict=True)):
        of_k = slice(k * share, (k + 1) * share)
        mine = [v[of_k] if isinstance(v, Tensor) and v.ndim else v for v in values]
        args, kwargs = tree_unflatten(mine, layout)
        outputs.append(run_sites(part.sites, module, leaves_of_k, base, *args, **kwargs))
    return _joined(outputs)


def _takes_stack(part: Part, module: nn.Module) -> bool:
    """True if the variant's ``apply`` runs all adapters of a part at once."""
    (site, *_) = part.sites
    takes = site.variant.stacks and len(part.sites) == 1 and runs_apply(part.sites, module)
    return takes and not mixes_rows(module, site.path)


def _run_stack(part: Part, module: nn.Module, x: Tensor) -> Tensor:
    (site,) = part.sites
    if part.unused:
        part.unused.difference_update(site.known)
    rows = x.reshape(part.size, -1 if x.numel() else 0, x.shape[-1])
    y = run_apply(part.sites, module, part.leaves.at(part.sites), rows)
    return y.view(*x.shape[:-1], y.shape[-1])


def _joined(pieces: Sequence[Any]) -> Any:
    if len(pieces) > 1 and not all(tensor.ndim for tensor in tensors_of(pieces[0])):
        raise FoldError("an adapted module returns a number, which adapters cannot share")
    return joined(pieces)
