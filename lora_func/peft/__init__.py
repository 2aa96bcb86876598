"""PEFT's checkpoints, written and read without PEFT.

The format of a method is the field ``peft`` of its ``Variant``.
"""

from lora_func.peft._read import from_peft
from lora_func.peft._write import to_peft

__all__ = ["from_peft", "to_peft"]
