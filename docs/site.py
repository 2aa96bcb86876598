"""The pages of the site that are made from other files: the README, and a page for each variant."""

import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path

import formulas
import tables
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import lora_func as lf
from lora_func.costs import cost_of

FROM_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
FROM_ROOT |= {"CHANGELOG.md": "changelog.md"}
WIDTH, RANK = 256, 8
"""The layer on which the pages of variants say what a method costs."""


def on_config(config: MkDocsConfig) -> None:
    """List the pages of the variants, by family."""
    by_family: dict[str, list[str]] = {}
    for method, _, family in tables.configs():
        by_family.setdefault(str(family), []).append(f"variants/{tables.page_of(method)}")
    chapter(config, "Variants").extend([{family: pages} for family, pages in by_family.items()])


def chapter(config: MkDocsConfig, title: str) -> list:
    """The pages of a chapter, as mkdocs.yml lists them."""
    (pages,) = (entry[title] for entry in config.nav or [] if title in entry)
    return pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages before the links are checked."""
    for source, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=from_root(tables.ROOT / source)))
    pages = variant_pages() | {"reference/index.md": reference(chapter(config, "Reference")[1:])}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Lead links that are right in the repository to the pages that are made from other files."""
    markdown = markdown.replace("](../CONTRIBUTING.md", "](contributing.md")
    return re.sub(r"\]\((?:\.\./){2}lora_func/variants/(\w+)\.py\)", r"](\1.md)", markdown)


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Lead the links of notebooks to pages, which mkdocs does for Markdown alone."""
    if not page.file.src_uri.startswith("notebooks/"):
        return html
    return re.sub(r'href="\.\./(\w+)\.md', r'href="../../\1/', html)


def from_root(path: Path) -> str:
    """A page of the repository's root, with its links as they are seen from docs/."""
    text = path.read_text().replace("](docs/", "](")
    for source, page in FROM_ROOT.items():
        text = text.replace(f"]({source})", f"]({page})")
    return text.replace("[LICENSE](LICENSE)", "LICENSE")


def reference(pages: list[str]) -> str:
    """A table of all names on the pages, with the first lines of their docstrings."""
    parts = ["# Reference", "Configs have their pages under [variants](../variants/index.md)."]
    for page in map(Path, pages):
        text = (tables.ROOT / "docs" / page).read_text()
        title = text.splitlines()[0].removeprefix("# ")
        parts.append(f"## [{title}]({page.name})")
        rows = ["| name | what it is |", "|---|---|"]
        for path in re.findall(r"^::: lora_func\.(\S+)$", text, re.MULTILINE):
            what = pkgutil.resolve_name(f"lora_func.{path}")
            named = inspect.isclass(what) or inspect.isfunction(what)
            told = str(inspect.getdoc(what)).splitlines()[0] if named else f"The type `{what}`."
            rows.append(f"| [`{path}`]({page.name}#lora_func.{path}) | {told} |".replace("``", "`"))
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


@cache
def variant_pages() -> dict[str, str]:
    """The pages of all configs, by their places in docs/."""
    pages = {}
    for config, text, family in tables.configs():
        variants = [v for v in tables.grouped() if v.config is config]
        pages[f"variants/{tables.page_of(config)}"] = variant_page(config, text, family, variants)
    return pages


def variant_page(config: type, text: str, family: str | None, variants: list[lf.Variant]) -> str:
    """What a method is, what it costs, where it comes from, and its code."""
    title, _, rest = text.partition("\n\n")
    told, _, notes = rest.partition("References:")
    sources, _, deviations = notes.partition("Deviations:")
    parts = [
        f"# {config.__name__}\n\n*{family}*: {title.partition(': ')[2]}",
        paragraphs(told),
        "## Settings\n",
        settings(config),
        example(config),
        "## Cost\n",
        costs(variants),
        "## What works with it\n",
        "\n".join(tables.properties(variants)),
        "## Sources\n",
        linked(inspect.cleandoc(sources)),
        f"## Where paper and code differ\n\n{linked(deviations.strip())}" if deviations else "",
        "## The code\n",
        code(config),
    ]
    return "\n\n".join(part for part in parts if part)


def paragraphs(text: str) -> str:
    """The paragraphs of a docstring, with formulas for those that are indented."""
    blocks = re.split(r"\n\n+", text.strip("\n"))
    return "\n\n".join(shown_formula(b) if b.startswith("    ") else linked(b) for b in blocks)


def shown_formula(block: str) -> str:
    """A block of formulas, a line each."""
    lines = (f"<div>{formulas.formula(line)}</div>" for line in block.splitlines())
    return f'<div class="formula">{"".join(lines)}</div>'


def linked(text: str) -> str:
    """The text with its addresses as links."""
    return re.sub(rf"(?<!\()({tables.ADDRESS})", r"<\1>", text)


def settings(config: type) -> str:
    """A table of the fields: the default, and what it means."""
    told = dict(documented(config.__doc__ or ""))
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    own = {field.name for field in fields(lf.LinearConfig)}
    for field in sorted(fields(config), key=lambda field: field.name in own):
        rows.append(f"| `{field.name}` | {default_of(field)} | {told[field.name]} |")
    return "\n".join(rows)


def default_of(field: Field) -> str:
    """The default of a field of a config, as code."""
    if field.default is not MISSING:
        return f"`{field.default!r}`"
    return "required" if field.default_factory is MISSING else f"`{field.default_factory()!r}`"


def sections(doc: str, title: str) -> list[str]:
    """The texts of the sections of a docstring whose title fits, without their indentation."""
    found = re.findall(rf"^{title}:\n((?:^ .*\n?|^\n)+)", doc, re.MULTILINE)
    return [*map(inspect.cleandoc, found)]


def documented(doc: str) -> Iterator[tuple[str, str]]:
    """The fields that a docstring documents, and the texts."""
    for section in sections(doc, "Attributes.*"):
        entries = re.split(r"^(?=\w+: )", section, flags=re.MULTILINE)
        for entry in filter(None, entries):
            name, _, meaning = entry.partition(": ")
            yield name, " ".join(meaning.split()).replace("|", r"\|")


def example(config: type) -> str:
    """The example of the config's docstring."""
    return "".join(f"```pycon\n{text}\n```" for text in sections(config.__doc__ or "", "Examples"))


def costs(variants: list[lf.Variant]) -> str:
    """A row for each trial of the variants."""
    rows = [
        f"On a layer of {WIDTH} x {WIDTH}, with rank {RANK} where there is a rank. Products are "
        "multiply-adds in the forward pass beside those of the layer, as a part of the layer's; "
        "those of each call do not depend on the number of tokens. The learning rate is a round "
        "number for AdamW, from which a search may begin.\n",
        "| setting | learning rate | trained | constants | products, each token | each call |",
        "|---|---|---|---|---|---|",
    ]
    for variant in variants:
        for name, trial in variant.trials.items():
            cost = cost_of(variant, trial, WIDTH, RANK)
            cells = (name, f"{trial.lr:g}", f"{cost.trained:,}", f"{cost.constants:,}")
            cells += (f"{cost.products / WIDTH**2:.1%}", f"{cost.fixed:,}")
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def code(config: type) -> str:
    """The file of a method, without the docstring that the page has shown."""
    module = sys.modules[config.__module__]
    source = inspect.getsource(module).replace(f'"""{module.__doc__}"""', "", 1).strip()
    lines = "\n".join(f"    {line}".rstrip() for line in source.splitlines())
    name = f"lora_func/variants/{tables.page_of(config, '.py')}"
    return f'??? example "`{name}`"\n\n    ```python\n{lines}\n    ```'
