"""A package outside tests its variant in three lines."""

import subprocess
import sys

PACKAGE = """
from lora_func.variants import register
from lora_func.variants._template import VARIANT, Template, apply

def doubled(W, params, x):
    return apply(W, {**params, "B": 2 * params["B"]}, x)

register(VARIANT._replace(apply=APPLY))
"""

TESTS = """
from lora_func.testing import Case, variant_tests
from my_package import Template
test_mine = variant_tests([Case("mine", lambda r: Template(r=r), dead=frozenset({"A", "g"}))])
"""


def outside(folder, apply, laws):
    """Run the three lines in a process of their own; return what pytest says of each test."""
    (folder / "my_package.py").write_text(PACKAGE.replace("APPLY", apply))
    (folder / "test_mine.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-k", laws, "test_mine.py"]
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout
    return [line for line in output.splitlines() if line.startswith(("PASSED", "FAILED"))]


def test_three_lines_pass_for_a_right_variant(tmp_path):
    found = outside(tmp_path, "apply", "start or unstack or affine")
    assert len(found) == 4
    assert "PASSED test_mine.py::test_mine[start_is_the_base-mine]" in found
    assert not [line for line in found if line.startswith("FAILED")]


def test_three_lines_name_the_law_that_is_broken(tmp_path):
    (found,) = outside(tmp_path, "doubled", "weight_view_is")
    assert found.startswith(
        "FAILED test_mine.py::test_mine[weight_view_is_the_activation_view-mine]"
    )
