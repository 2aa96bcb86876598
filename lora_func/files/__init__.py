"""Adapters and training states in safetensors files, and the base weights they belong to.

The format of PEFT belongs to ``peft``.
"""

from lora_func.files._adapters import load, save
from lora_func.files._container import byte_view, kind_of, read, replace_file
from lora_func.files._training_state import (
    TRAINING_STATE,
    TrainingState,
    adapters_of,
    load_training_state,
    save_training_state,
)

__all__ = [
    "TRAINING_STATE",
    "TrainingState",
    "adapters_of",
    "byte_view",
    "kind_of",
    "load",
    "load_training_state",
    "read",
    "replace_file",
    "save",
    "save_training_state",
]
