"""A table of an adapter."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lora_func.adapter._keys import check_adapter, group, partition
from lora_func.modules import inner_model, whole
from lora_func.variant import Variant, rank_of
from lora_func.variants import by_name
from lora_func.weights import numel_of, weight_at

if TYPE_CHECKING:
    from rich.table import Table


def summary(params: Mapping[str, Tensor], model: nn.Module | None = None) -> Table:
    """Tabulate an adapter or a stack: one row for each site, totals below.

    Args:
        params: The adapter. For a stack, scales and norms are shown as a range, and parameters are
            counted over all adapters.
        model: The model it belongs to; with it, the total is also given as a percentage of the
            model's parameters, and norms that need the shape of a weight are shown.

    Returns:
        A table for ``print`` or ``rich.print``: site, variant, rank, scale, dtype, trained
        parameters, and the Frobenius norm of the change of the weight if that is cheap. A narrow
        terminal shows the ends of long paths.

    Raises:
        KeyError: If a key is malformed or names no variant.
        TypeError: If params is no mapping.

    Examples:
        >>> import torch, lora_func as lf
        >>> print(lf.summary(lf.init(torch.nn.Linear(4, 4), lf.LoRA(r=2))))
        <BLANKLINE>
          site          variant   r   scale     dtype   trained   ‖ΔW‖
        ...
    """
    from rich import box
    from rich.markup import escape

    check_adapter(params)
    params = {key: whole(leaf) for key, leaf in params.items()}
    trained, _ = partition(params)
    sites = group(params)
    table = _printable_table()(box=box.SIMPLE, show_footer=True)
    for name in ("site", "variant", "r", "scale", "dtype", "trained", "‖ΔW‖"):
        table.add_column(name, justify="left" if name in ("site", "variant") else "right")
    for (site, name), keys in sites.items():
        variant, leaves = by_name(name), {leaf: params[key] for leaf, key in keys.items()}
        of_site = [params[key] for key in keys.values() if key in trained]
        norm = _norm(variant, leaves, site, model)
        table.add_row(
            end_of_path(site or "(the model)"),
            escape(name),
            str(rank_of(variant, leaves) or "–"),
            _range(leaves.get("_scale")),
            ", ".join(sorted({str(leaf.dtype).removeprefix("torch.") for leaf in of_site})),
            f"{sum(leaf.numel() for leaf in of_site):,}",
            _range(norm),
        )
    total = sum(leaf.numel() for leaf in trained.values())
    table.columns[0].footer = f"{len(sites)} sites"
    table.columns[-2].footer = f"{total:,}"
    if model is not None:
        of_model = sum(numel_of(parameter) for parameter in model.parameters())
        table.caption = f"{total / max(of_model, 1):.3%} of the model's parameters"
    return table


def _printable_table() -> type[Table]:
    """The class of tables that ``str`` renders; rich is imported when it is needed."""
    from rich.console import Console
    from rich.table import Table

    class PrintableTable(Table):
        def __str__(self) -> str:
            console = Console(file=io.StringIO(), width=Console().width)
            console.print(self)
            return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    return PrintableTable


def end_of_path(path: str) -> Any:
    """Return a cell of a table in which a narrow column shows the end of a path."""
    from rich.measure import Measurement
    from rich.text import Text

    class Path:
        def __rich_console__(self, console: Any, options: Any) -> Iterator[Text]:
            room = options.max_width
            yield Text(path if len(path) <= room else f"…{path[1 - room :]}", no_wrap=True)

        def __rich_measure__(self, console: Any, options: Any) -> Measurement:
            return Measurement(min(len(path), 16), len(path))

    return Path()


def _norm(
    variant: Variant, leaves: Mapping[str, Tensor], site: str, model: nn.Module | None
) -> Tensor | None:
    if variant.delta_norm is None:
        return None
    if model is None:
        return variant.delta_norm(leaves, None)
    d_out, d_in = weight_at(inner_model(model), site).weight.shape[-2:]
    return variant.delta_norm(leaves, (d_out, d_in))


def _range(values: Tensor | None) -> str:
    """One number, or the smallest and the largest of a stack."""
    if values is None:
        return "–"
    low, high = (f"{bound:.4g}" for bound in values.detach().aminmax())
    return low if low == high else f"{low} … {high}"
