"""Making adapters: ``init``, and the pass over calibration data.

What a variant makes of a weight or of data belongs to its file in ``variants``; which sites it is
made for belongs to ``targeting``.
"""

from lora_func.initialization._init import init

__all__ = ["init"]
