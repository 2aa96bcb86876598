"""PEFT's checkpoints: written and read without PEFT."""

from lora_func._peft_read import from_peft
from lora_func._peft_write import to_peft

__all__ = ["from_peft", "to_peft"]
