"""Public names: exactly the exported names are documented."""

import inspect
import pkgutil
import re
from dataclasses import fields
from pathlib import Path

import pytest

import lora_func as lf

ROOT = Path(__file__).parent.parent
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def test_the_namespace_is_what_it_says():
    packages = {module.name for module in pkgutil.iter_modules(lf.__path__)}
    public = {name for name in vars(lf) if not name.startswith("_")} - packages
    assert public == set(lf.__all__) - {"peft", "rules", "__version__"}


def test_the_reference_has_every_public_name_and_no_other():
    page = re.sub(r"<!-- table: properties -->.*?\n\n", "", REFERENCE, flags=re.DOTALL)
    documented = {*re.findall(r"^\| `(\w+)`? \|", page, re.MULTILINE)}
    assert documented == {*lf.__all__} - {"peft", "rules", "__version__"}


@pytest.mark.parametrize(
    "config", [getattr(lf, n) for n in lf.__all__ if hasattr(getattr(lf, n), "site_patterns")]
)
def test_help_of_a_config_tells_every_field(config):
    for field in fields(config):
        assert re.search(rf"^ +{field.name}: ", config.__doc__, re.MULTILINE), field.name


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
