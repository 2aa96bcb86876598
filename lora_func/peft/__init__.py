"""PEFT's checkpoints, written and read without PEFT.

The format of a method is the field ``peft`` of its ``Variant``.
"""

from lora_func.peft._checkpoint import read_config, read_tensors
from lora_func.peft._formats import writable_format
from lora_func.peft._read import from_peft
from lora_func.peft._write import to_peft

__all__ = ["from_peft", "read_config", "read_tensors", "to_peft", "writable_format"]
