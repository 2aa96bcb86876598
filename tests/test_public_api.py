"""The public names: exported, documented, and nothing else."""

import inspect
import re
from pathlib import Path

import pytest

import lora_func as lf

ROOT = Path(__file__).parent.parent
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def test_the_namespace_is_what_it_says():
    modules = {"variants", "peft"}
    public = {name for name in vars(lf) if not name.startswith("_")} - modules
    assert public == set(lf.__all__)


def test_every_public_name_is_in_the_reference():
    assert set(re.findall(r"^\| `(\w+)", REFERENCE, re.MULTILINE)) == set(lf.__all__)


@pytest.mark.parametrize("name", [n for n in lf.__all__ if callable(getattr(lf, n))])
def test_every_public_name_has_a_docstring(name):
    documented = inspect.getdoc(getattr(lf, name))
    assert documented, name
    if inspect.isfunction(getattr(lf, name)):
        parameters = inspect.signature(getattr(lf, name)).parameters
        for parameter in parameters:
            assert re.search(rf"\b{parameter}: ", documented), (
                f"{name}: {parameter} is undocumented"
            )
