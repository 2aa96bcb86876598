"""Making adapters: ``init``, ``loftq``, and the pass over calibration data.

What a variant makes of a weight or of data belongs to its file in ``variants``; which sites it is
made for belongs to ``targeting``.
"""

from lora_func.initialization._init import init
from lora_func.initialization._loftq import loftq, nf4

__all__ = ["init", "loftq", "nf4"]
