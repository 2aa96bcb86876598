"""The laws of adapters, for everybody's variants: ``pip install 'lora_func[testing]'``.

A ``Case`` says what is to be known about one configuration of a variant. ``variant_tests`` makes
the tests of a table of cases; ``check_variant`` makes a report without pytest; ``check_foreign``
looks at modules of other packages. Each function of ``laws`` is one law. Tests of this library
import their laws and strategies from here.
"""

from lora_func.testing import laws
from lora_func.testing._cases import Case, Fit, Start, Subject
from lora_func.testing._foreign import ForeignCase, check_foreign
from lora_func.testing._law import Counterexample, Draw, Law, law
from lora_func.testing._layers import Layer, Layers, random_like, random_stack
from lora_func.testing._report import Report, Verdict, check_variant
from lora_func.testing._strategies import (
    Stacked,
    batches,
    dims,
    dtypes,
    floats,
    layers,
    seeds,
    stacks,
)
from lora_func.testing._suite import variant_tests
from lora_func.testing.laws import LAWS

__all__ = [
    "LAWS",
    "Case",
    "Counterexample",
    "Draw",
    "Fit",
    "ForeignCase",
    "Law",
    "Layer",
    "Layers",
    "Report",
    "Stacked",
    "Start",
    "Subject",
    "Verdict",
    "batches",
    "check_foreign",
    "check_variant",
    "dims",
    "dtypes",
    "floats",
    "law",
    "laws",
    "layers",
    "random_like",
    "random_stack",
    "seeds",
    "stacks",
    "variant_tests",
]
