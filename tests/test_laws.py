"""Every law of the kit on every case."""

from lora_func.testing import variant_tests
from tests.support.cases import CASES

test_laws = variant_tests(CASES)
