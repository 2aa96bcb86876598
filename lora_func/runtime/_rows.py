"""K adapters in one call: the rows of the batch belong to one adapter after another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lora_func.errors import FoldError
from lora_func.runtime._frozen import Forward, OtherForward
from lora_func.runtime._layout import Site
from lora_func.runtime._selection import refuse_selected
from lora_func.runtime._sites import leaves_of, named, run_sites, runs_apply
from lora_func.runtime._trees import joined, tensors_of
from lora_func.weights._bitsandbytes import mixes_rows
from lora_func.weights._layers import affine


class Rows(NamedTuple):
    """Whose rows are whose.

    Attributes:
        sizes: The number of adapters in each stack.
        batch: The number of rows of each adapter.
    """

    sizes: tuple[int, ...]
    batch: int

    @property
    def adapters(self) -> int:
        """The number of adapters."""
        return sum(self.sizes)


class Part(NamedTuple):
    """What one stack does at a module.

    Attributes:
        size: The number of its adapters.
        sites: Its sites there; none if it leaves the module as it is.
        params: The stack, (size, ...) each.
        unused: Its keys, of which those here are struck off when the module runs.
    """

    size: int
    sites: Sequence[Site]
    params: Mapping[str, Tensor]
    unused: set[str] | None


@dataclass(slots=True, eq=False, repr=False)
class Together(OtherForward):
    """Runs a module that several adapters share; every tensor it is called with has its rows first.

    Attributes:
        path: The module's path, for messages.
        module: The module.
        rows: Whose rows are whose.
        parts: What each stack does there.
    """

    path: str
    module: nn.Module
    rows: Rows
    parts: Sequence[Part]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._run(*tree_flatten((args, kwargs)))
        except Exception as error:
            error.add_note(f"in the {named(site for part in self.parts for site in part.sites)}")
            raise

    def _run(self, values: list[Any], layout: Any) -> Any:
        refuse_selected(self.path, values)
        places = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.ndim]
        share = _rows_of_one(self.path, [values[i] for i in places], self.rows)
        sizes = [part.size * share for part in self.parts]
        pieces = {i: values[i].split(sizes) for i in places} if len(self.parts) > 1 else {}
        outputs = []
        for j, part in enumerate(self.parts):
            mine = [pieces[i][j] if i in pieces else value for i, value in enumerate(values)]
            outputs.append(_run_part(self.path, part, self.module, self.base, share, mine, layout))
        return _joined(outputs)


@dataclass(slots=True, eq=False, repr=False)
class Untouched(OtherForward):
    """Runs a quantised module that several adapters run through and none changes.

    Attributes:
        path: The module's path, for messages.
        module: The module.
        rows: Whose rows are whose.
    """

    path: str
    module: nn.Module
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
    frozen: Forward,
    share: int,
    values: list[Any],
    layout: Any,
) -> Any:
    mixed = mixes_rows(module, path)
    if not part.sites and not mixed:
        args, kwargs = tree_unflatten(values, layout)
        return frozen(*args, **kwargs)
    params = {key: part.params[key] for site in part.sites for key in site.keys.values()}
    if part.unused is not None:
        part.unused.difference_update(params)

    def one(params: Mapping[str, Tensor], *values: Any) -> Any:
        args, kwargs = tree_unflatten([*values], layout)
        if not part.sites:
            return frozen(*args, **kwargs)
        leaves = [leaves_of(site, params) for site in part.sites]
        return run_sites(part.sites, module, leaves, frozen, *args, **kwargs)

    if not part.sites or runs_apply(part.sites, module):
        (x,) = values
        if x.ndim > 1 and not mixed and all(site.variant.stacks for site in part.sites):
            return _run_stack(part, module, x)
        y = torch.vmap(one, randomness="different")(params, x.unflatten(0, (part.size, share)))
        assert isinstance(y, Tensor)
        return y.flatten(0, 1)
    outputs = []
    for k in range(part.size):
        rows = slice(k * share, (k + 1) * share)
        mine = [v[rows] if isinstance(v, Tensor) and v.ndim else v for v in values]
        outputs.append(one({key: stack[k] for key, stack in params.items()}, *mine))
    return _joined(outputs)


def _run_stack(part: Part, module: nn.Module, x: Tensor) -> Tensor:
    (site,) = part.sites
    rows = x.reshape(part.size, -1 if x.numel() else 0, x.shape[-1])
    y = site.variant.apply(affine(module, site.path), leaves_of(site, part.params), rows)
    return y.view(*x.shape[:-1], y.shape[-1])


def _joined(pieces: Sequence[Any]) -> Any:
    if len(pieces) > 1 and not all(tensor.ndim for tensor in tensors_of(pieces[0])):
        raise FoldError("an adapted module gives a number, which adapters cannot share")
    return joined(pieces)
