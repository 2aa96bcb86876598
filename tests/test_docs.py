"""The Python blocks of each page run in order, as one program, and so do the notebooks."""

import re
import subprocess
import sys
from pathlib import Path

import formulas
import nbclient
import nbformat
import peft_laws
import pytest
import tables

from lora_func import __main__

ROOT = Path(__file__).parent.parent
PEFT_TABLE = re.compile(r"<!-- table: peft -->\n.*?<!-- end -->", re.DOTALL)
LAWS = ROOT / "docs" / "testing.md"
QUIET = """
import warnings

warnings.simplefilter("error")
for of_others in (
    "`torch.jit.script` is deprecated",  # torch itself, on the first forward-mode derivative
    "`isinstance.treespec, LeafSpec.` is deprecated",  # lightning asks torch in an old way
    "The 'train_dataloader' does not have many workers",
):
    warnings.filterwarnings("ignore", of_others)
"""
NOXFILE = (ROOT / "noxfile.py").read_text()
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page, language="python"):
    fenced = rf"^```{language}\n(.*?)^```$"
    return re.findall(fenced, page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_the_code_runs(page, tmp_path):
    # the one-liner at the top of README is an illustration
    code = [block for block in blocks(page) if not block.startswith("params = init(")]
    program = tmp_path / "page.py"
    program.write_text("\n".join([QUIET, *code]))
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def commands():
    """The commands of this project in the shell blocks of all pages."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for block in blocks(page, "bash"):
            for line in block.splitlines():
                for command in line.partition("  #")[0].split("&&"):
                    yield page.relative_to(ROOT).as_posix(), command.strip()


def test_shell_commands_name_what_is_there():
    sessions = {*re.findall(r'(?<=^def )\w+(?=\(session)|(?<=name=")[\w-]+', NOXFILE, re.MULTILINE)}
    seen = 0
    for page, command in commands():
        if named := re.search(r"-m nox -s ([\w-]+)", command):
            assert named[1] in sessions, (page, command)
            seen += 1
        if script := re.search(r"(?:examples|benchmarks)/\w+\.py", command):
            assert (ROOT / script[0]).exists(), (page, command)
            seen += 1
        if used := re.search(r"-m lora_func (\w+)", command):
            with pytest.raises(SystemExit) as left:
                __main__.main([used[1], "--help"])
            assert left.value.code == 0, (page, command)
            seen += 1
    assert seen > 15


@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_the_notebook_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300).execute()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("W' = s_iᵀ", "<var>W</var>′ = <var>s</var><sub><var>i</var></sub><sup>T</sup>"),
        ("√(r + 1)", '√<span class="root"><var>r</var> + 1</span>'),
        ("d_in, A0", "<var>d</var><sub>in</sub>, <var>A</var><sub>0</sub>"),
        ("tanh(x) <= 1e-5", '<span class="function">tanh</span>(<var>x</var>) &lt;= 1e-5'),
        ("``depth``, alpha_pattern", "<code>depth</code>, <code>alpha_pattern</code>"),
    ],
)
def test_a_formula_is_typeset(text, shown):
    assert formulas.formula(text) == shown


def test_every_variant_has_a_formula():
    for config, text, _ in tables.configs():
        assert re.search(r"^    \S", text.partition("References:")[0], re.MULTILINE), config


def test_the_fifteen_lines_are_fifteen():
    quickstart = blocks(ROOT / "README.md")[1]
    assert len([line for line in quickstart.splitlines() if line.strip()]) == 15


def test_the_table_of_packages_names_every_package():
    folders = {face.parent.name for face in tables.PACKAGE.glob("*/__init__.py")}
    assert folders == {name for row in tables.packages() for name in re.findall(r"`(\w+)/`", row)}


def test_the_tables_are_those_of_the_docstrings():
    for page in tables.PAGES:
        text = re.sub(
            r"<!-- table: peft -->.*?<!-- end -->", "", (ROOT / page).read_text(), flags=re.DOTALL
        )
        assert tables.filled(text) == text, f"{page}: run `python -m nox -s tables`"


def test_the_table_of_pefts_methods_is_what_they_do():
    found = PEFT_TABLE.search(LAWS.read_text())[0]
    if f"method of PEFT {peft_laws.version()} |" not in found:
        pytest.skip("made with another version of PEFT")
    assert tables.filled(found) == found, "docs/testing.md: run `python -m nox -s tables`"


def test_links_lead_somewhere():
    for page in [*PAGES, *NOTEBOOKS, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
