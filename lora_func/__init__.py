"""LoRA-family adapters as pure functions on torch.func.

``params = init(model, cfg); loss = fcall(model, params, batch)``
"""

from lora_func._call import adapted, fcall
from lora_func._config import AdapterConfig, LinearConfig, LowRankConfig, ParameterConfig
from lora_func._errors import BusyModelError, UnusedLeafError
from lora_func._init import init
from lora_func._keys import partition
from lora_func._running import skeleton
from lora_func._stack import stack, unstack
from lora_func._summary import summary
from lora_func._targets import find_targets
from lora_func._types import Params, Variant
from lora_func._weight import Affine, Weight, dense, linear
from lora_func.variants import register
from lora_func.variants.full import Full
from lora_func.variants.lora import LoRA

__all__ = [
    "AdapterConfig",
    "Affine",
    "BusyModelError",
    "Full",
    "LinearConfig",
    "LoRA",
    "LowRankConfig",
    "ParameterConfig",
    "Params",
    "UnusedLeafError",
    "Variant",
    "Weight",
    "adapted",
    "dense",
    "fcall",
    "find_targets",
    "init",
    "linear",
    "partition",
    "register",
    "skeleton",
    "stack",
    "summary",
    "unstack",
]
