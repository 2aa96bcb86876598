"""Adapters and training states in safetensors files, and the base weights they belong to.

The format of PEFT belongs to ``peft``.
"""

from lora_func.files._adapters import load, read_adapter, save
from lora_func.files._container import byte_view, replace_file
from lora_func.files._training_state import (
    TrainingState,
    load_training_state,
    save_training_state,
)

__all__ = [
    "TrainingState",
    "byte_view",
    "load",
    "load_training_state",
    "read_adapter",
    "replace_file",
    "save",
    "save_training_state",
]
