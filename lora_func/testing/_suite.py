"""The laws as tests of pytest."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lora_func.testing._cases import Subject
from lora_func.testing._law import Law
from lora_func.testing.laws import LAWS


def variant_tests(
    cases: Iterable[Subject], laws: Sequence[Law] = LAWS, marks: Sequence[Any] = ()
) -> Callable[..., None]:
    """Make the tests of a table of cases: each law that says something about a case, on the case.

    Args:
        cases: The cases.
        laws: The laws; all by default.
        marks: Marks of pytest for all tests.

    Returns:
        A test function with parameters. Its ids are "law-case".

    Examples:
        In a test file, of which these three lines are all that a variant needs::

            from lora_func.testing import Case, variant_tests
            from my_package import MyLoRA
            test_my_lora = variant_tests([Case("my-lora", lambda r: MyLoRA(r=r))])
    """
    import pytest

    pairs = [
        pytest.param(law, case, id=f"{law}-{case}", marks=marks)
        for case in cases
        for law in laws
        if law.applies(case)
    ]

    @pytest.mark.parametrize(("law", "case"), pairs)
    def test_law(law: Law, case: Subject) -> None:
        law(case)

    return test_law
