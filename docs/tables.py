"""The tables of README, docs and CONTRIBUTING that are made from docstrings.

    python -m nox -s tables

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import lora_func as lf
from lora_func.testing import LAWS
from lora_func.variant import Family
from lora_func.variants import all_variants

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/variants/index.md",
    "docs/devices.md",
    "docs/testing.md",
)
PACKAGE = ROOT / "lora_func"
ADDRESS = r"https://[^\s,;)]+[^\s,;).]"


def built_in() -> list[lf.Variant]:
    """The variants of the library, without the template and without other packages."""
    inside = re.compile(r"lora_func\.variants\.[a-z]\w*")
    return [v for v in all_variants() if inside.fullmatch(v.config.__module__)]


def grouped() -> list[lf.Variant]:
    """The same, by families in the order in which they are declared."""
    return sorted(built_in(), key=lambda variant: get_args(Family).index(variant.family))


def configs() -> Iterator[tuple[type[lf.AdapterConfig], str, str | None]]:
    """Each config class of the library, the docstring of its module and the family, by families."""
    found: dict[type[lf.AdapterConfig], str | None] = {}
    for variant in grouped():
        found.setdefault(variant.config, variant.family)
    for config, family in found.items():
        yield config, inspect.cleandoc(sys.modules[config.__module__].__doc__ or ""), family


def link(address: str) -> str:
    """A link that shows the number of an arXiv paper, or the last part of the address."""
    arxiv = re.fullmatch(r"https://arxiv\.org/abs/(.+)", address)
    return f"[{arxiv[1] if arxiv else address.rpartition('/')[2]}]({address})"


def variants() -> list[str]:
    """What each config does, and where it comes from."""
    rows = ["| family | config | what it does | source |", "|---|---|---|---|"]
    for config, text, family in configs():
        phrase = text.split("\n")[0].partition(": ")[2].rstrip(".")
        cited = text.partition("References:")[2].partition("\n\n")[0]
        sources = dict.fromkeys(re.findall(ADDRESS, cited))
        name = f"[{config.__name__}](../../lora_func/variants/{page_of(config, '.py')})"
        cells = (family, name, phrase, ", ".join(map(link, sources)) or "–")
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


def page_of(config: type[lf.AdapterConfig], suffix: str = ".md") -> str:
    """The file name of a method's page, or of its code."""
    return config.__module__.rpartition(".")[2] + suffix


def families() -> list[str]:
    """The methods of each family."""
    rows = ["| family | methods |", "|---|---|"]
    for family in get_args(Family):
        names = [f"`{config.__name__}`" for config, _, own in configs() if own == family]
        rows.append(f"| {family} | {', '.join(names)} |")
    return rows


def properties(variants: list[lf.Variant] | None = None) -> list[str]:
    """What each variant can do, read from its fields."""
    columns = ("family", "variant", "start", "weight", "mixed ranks", "embeddings, convolutions")
    rows = [f"| {' | '.join(columns)} | `combine` | PEFT |", "|---|---|---|---|---|---|---|---|"]
    for variant in grouped() if variants is None else variants:
        sums = "low rank" if variant.low_rank else "leaves" if variant.neutral else "–"
        kinds = dict.fromkeys(one.peft_type for one in variant.peft)
        narrow = "narrow products" if variant.products_only else "whole weight"
        cells = [
            str(variant.family),
            f"`{variant.name}`",
            " or ".join(sorted({trial.start for trial in variant.trials.values()})) or "exact",
            "yes" if variant.weight else "no",
            "yes" if variant.pads else "–",
            narrow if variant.weight else "–",
            sums,
            ", ".join(kinds) or "–",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def packages() -> list[str]:
    """What belongs into each package, in the order of imports."""
    rows = ["| module | what belongs there |", "|---|---|"]
    files = [PACKAGE / f"{name}.py" for name in ("version", "errors", "checks", "compat")]
    folders = ("modules", "configs", "weights", "variant", "numerics", "variants", "adapter")
    folders += (
        "rules",
        "targeting",
        "runtime",
        "initialization",
        "sweep",
        "graphs",
        "export",
        "files",
    )
    folders += ("distributed", "peft", "testing")
    files += [PACKAGE / name / "__init__.py" for name in folders]
    for file in files:
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
        name = file.parent.name + "/" if file.stem == "__init__" else file.name
        kept = text.split("\n\n")[: 2 if file.stem == "__init__" else 1]
        rows.append(f"| `{name}` | {' '.join(' '.join(kept).split()).replace('``', '`')} |")
    return rows


BASES = {"8B": (8.0, 42e6, 32, 4096), "70B": (70.0, 207e6, 80, 8192)}
"""Parameters in billions, trained numbers of a LoRA of rank 16 everywhere, layers, width."""

ADAPTERS, TOKENS, BANDWIDTH, FLOPS = 256, 128, 200, 400e12
"""Adapters, tokens of each, GB that a GPU receives in a second, operations in a second."""


def devices() -> list[str]:
    """The memory, the traffic and the time of the ways to use N GPUs, calculated."""
    rows = ["| base | GPUs | way | base, GB | adapters, GB | traffic, GB | its s | arithmetic, s |"]
    rows += ["|---|---|---|---|---|---|---|---|"]
    for name, (billions, trained, layers, width) in BASES.items():
        base, one = 2 * billions, 16 * trained / 1e9
        activations = 4 * layers * ADAPTERS * TOKENS * width * 2 * 2 / 1e9
        arithmetic = 4 * billions * 1e9 * ADAPTERS * TOKENS / FLOPS
        for gpus in (8, 64):
            ways = {
                "replicate, split adapters": (base, one * ADAPTERS / gpus, 0.0),
                "FSDP2, split adapters": (
                    base / gpus + 2 * base / layers,
                    one * ADAPTERS / gpus,
                    2 * base,
                ),
                "replicate, one adapter, split rows": (base, one, trained * 8e-9),
                "tensor parallel, all adapters": (base / gpus, one * ADAPTERS, activations),
            }
            for way, (held, own, received) in ways.items():
                traffic = received * (gpus - 1) / gpus
                cells = (f"{held:.0f}", f"{own:.1f}", f"{traffic:.1f}")
                seconds = (f"{traffic / BANDWIDTH:.2f}", f"{arithmetic / gpus:.2f}")
                rows.append(f"| {name} | {gpus} | {way} | {' | '.join((*cells, *seconds))} |")
    return rows


def laws() -> list[str]:
    """What each law says, and whether it needs a variant."""
    rows = ["| law | says | of other modules too |", "|---|---|---|"]
    for law in LAWS:
        statement = law.statement.replace("``", "`").replace("|", r"\|")
        rows.append(f"| `{law}` | {statement} | {'yes' if law.foreign else '–'} |")
    return rows


def peft() -> list[str]:
    """The laws that PEFT's methods break."""
    from peft_laws import table  # peft is imported for this table alone

    return table()


TABLES = {
    "families": families,
    "devices": devices,
    "variants": variants,
    "properties": properties,
    "packages": packages,
    "laws": laws,
    "peft": peft,
}


def filled(text: str) -> str:
    """A page with its tables made anew."""

    def table(found: re.Match[str]) -> str:
        return "\n".join([found[1], *TABLES[found[2]](), found[3]])

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", table, text, flags=re.DOTALL)


def main() -> None:
    """Write the tables of all pages."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
