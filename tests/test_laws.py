"""Every law of the kit on every case."""

from lora_func.testing import variant_tests
from tests.support.cases import CASES, OF_STARTS, OF_TOKENS

test_laws = variant_tests([*CASES, *OF_STARTS, *OF_TOKENS])
