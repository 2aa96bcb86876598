"""The Python blocks of each page in README and docs run in order, as one program."""

import re
import subprocess
import sys
from pathlib import Path

import peft_laws
import pytest
import tables

ROOT = Path(__file__).parent.parent
PEFT_TABLE = re.compile(r"<!-- table: peft -->\n.*?<!-- end -->", re.DOTALL)
LAWS = ROOT / "docs" / "testing.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_the_code_runs(page, tmp_path):
    # the one-liner at the top of README is an illustration
    code = [block for block in blocks(page) if not block.startswith("params = init(")]
    program = tmp_path / "page.py"
    program.write_text(
        "import warnings\nwarnings.simplefilter('error')\n"
        "warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated')\n" + "\n".join(code)
    )
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
