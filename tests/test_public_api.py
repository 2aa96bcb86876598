"""Public names: exactly the exported names are documented."""

import inspect
import pkgutil
import re
from dataclasses import fields
from pathlib import Path

import pytest
import tables

import lora_func as lf
from lora_func import distributed, peft, rules, testing
from lora_func.rules import adalora

NOT_LISTED = {"adalora", "LAWS", "laws", "Draw", "Fit", "Layers", "Start", "Subject", "Verdict"}
NOT_LISTED |= {"read_config", "read_tensors", "writable_format"}
"""Packages and names of types, and what the command line takes from `lora_func.peft`."""

ROOT = Path(__file__).parent.parent
REFERENCE = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))


def test_the_namespace_is_what_it_says():
    packages = {module.name for module in pkgutil.iter_modules(lf.__path__)}
    public = {name for name in vars(lf) if not name.startswith("_")} - packages
    assert public == set(lf.__all__) - {"peft", "rules", "__version__"}


def test_the_reference_has_every_public_name_and_no_other():
    """Configs of methods have pages of their own, which the site makes."""
    documented = [*re.findall(r"^::: lora_func\.(\S+)$", REFERENCE, re.MULTILINE)]
    methods = {config.__name__ for config, *_ in tables.configs()}
    assert len(documented) == len({*documented})
    top = {name for name in documented if "." not in name}
    assert top | methods == {*lf.__all__} - {"peft", "rules", "__version__"}
    for package in (peft, rules, adalora, distributed, testing):
        own = package.__name__.removeprefix("lora_func.")
        below = {name.removeprefix(f"{own}.") for name in documented if name.startswith(f"{own}.")}
        missing = {*package.__all__} - {name.partition(".")[0] for name in below} - NOT_LISTED
        assert not missing, package


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
