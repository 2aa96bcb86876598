"""Reports: the laws of one method checked without pytest."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_func.configs import AdapterConfig
from lora_func.testing._cases import Case, Fit, Start, Subject, find_fit
from lora_func.testing._law import Counterexample, Law
from lora_func.testing.laws import LAWS
from lora_func.variant import Variant
from lora_func.variants import registered
from lora_func.weights import affine


class Verdict(NamedTuple):
    """What was found about one law.

    Attributes:
        law: The law.
        counterexample: Where it is broken; None if it held on all examples.
    """

    law: Law
    counterexample: Counterexample | None


@dataclass(frozen=True)
class Report:
    """What was found about one method. Printed, it is a table.

    Attributes:
        name: The method.
        verdicts: One for each law that says something about it.
    """

    name: str
    verdicts: tuple[Verdict, ...]

    @property
    def broken(self) -> dict[str, Counterexample]:
        """The laws that are broken, by name."""
        found = {verdict.law.name: verdict.counterexample for verdict in self.verdicts}
        return {name: example for name, example in found.items() if example is not None}

    def __rich__(self) -> Any:
        """Build the table.

        Returns:
            A table of rich.
        """
        from rich.table import Table

        table = Table(title=f"{self.name}: {len(self.broken)} of {len(self.verdicts)} laws broken")
        for column in ("law", "held", "counterexample", "hint"):
            table.add_column(column, overflow="fold")
        for law, example in self.verdicts:
            if example is None:
                table.add_row(law.name, "yes", "", "")
            else:
                found = f"{example.drawn}\n{example.error[:300]}".strip()
                table.add_row(law.name, "[bold]NO[/bold]", found.replace("[", r"\["), law.hint)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def checked(case: Subject, laws: Iterable[Law], examples: int) -> Report:
    """Check laws on a case, with a progress bar.

    Args:
        case: The case.
        laws: The laws; those that say nothing about the case are left out.
        examples: How many examples to draw for each.

    Returns:
        The report.
    """
    from tqdm import tqdm

    applying = [law for law in laws if law.applies(case)]
    bar = tqdm(applying, desc=str(case), leave=False, disable=None)
    verdicts = [Verdict(law, law.counterexample(case, examples)) for law in bar]
    return Report(str(case), tuple(verdicts))


def check_variant(
    variant: Variant,
    cfg: AdapterConfig,
    *,
    dead: Collection[str] | None = None,
    bias: bool | None = None,
    start: Start = "exact",
    jumps: bool = False,
    detached: Collection[str] = (),
    data: str | None = None,
    fit: Fit | None = None,
    examples: int = 10,
    laws: Iterable[Law] = LAWS,
) -> Report:
    """Check a variant against all laws, in a short form that needs no pytest.

    Args:
        variant: The variant. It is registered while it is checked.
        cfg: Its config. If it has a field ``r``, other ranks are tried as well.
        dead: As in ``Case``; by default any leaf may have no gradient at the start.
        bias: As in ``Case``.
        start: As in ``Case``.
        jumps: As in ``Case``.
        detached: As in ``Case``.
        data: As in ``Case``.
        fit: As in ``Case``; by default sizes are found by trying.
        examples: How many examples to draw for each law.
        laws: The laws to check.

    Returns:
        The report; print it.

    Raises:
        ValueError: If the variant is malformed, or no sizes are found that it accepts.

    Examples:
        >>> import lora_func as lf
        >>> from lora_func.testing import check_variant
        >>> from lora_func.variants import lora
        >>> report = check_variant(lora.VARIANT, lf.LoRA(r=2), examples=2)
        >>> sorted(report.broken)
        []
    """
    has_rank = isinstance(getattr(cfg, "r", None), int) and any(f.name == "r" for f in fields(cfg))

    def config(r: int) -> AdapterConfig:
        return replace(cfg, r=r) if has_rank else cfg  # type: ignore[call-arg]

    settings: Any = {"bias": bias, "start": start, "jumps": jumps, "data": data}
    settings |= {"dead": None if dead is None else frozenset(dead), "detached": frozenset(detached)}
    case = Case(variant.name, config, **settings)
    with registered(variant):

        def make(layer: nn.Linear, r: int) -> object:
            if data is not None or not case.is_adapter:
                return case.params(layer, r)
            return variant.init(affine(layer), config(r), torch.Generator(), None)

        return checked(replace(case, fit=fit or find_fit(make, bias)), laws, examples)
