"""Functions of tensors on a GPU as CUDA graphs that are replayed: ``capture``.

The graph, the tensors that it reads and writes, and what a function may not do in it belong here.
What runs a model belongs to ``runtime``.
"""

from lora_func.graphs._capture import Captured, capture

__all__ = ["Captured", "capture"]
