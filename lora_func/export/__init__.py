"""Taking an adapter out of lora_func: a merged state dict, a live model, or the nearest LoRA.

Files belong to ``files``; PEFT's checkpoints belong to ``peft``.
"""

from lora_func.export._attach import Attached, attach
from lora_func.export._merge import merge
from lora_func.export._to_lora import AsLoRA, to_lora

__all__ = ["AsLoRA", "Attached", "attach", "merge", "to_lora"]
