"""LoRA-family adapters as pure functions on torch.func.

``params = init(model, cfg); loss = fcall(model, params, batch)``
"""

from lora_func.adapter._algebra import AsLoRA, combine, to_lora
from lora_func.adapter._keys import partition
from lora_func.adapter._stack import stack, unstack
from lora_func.adapter._summary import summary
from lora_func.configs import (
    AdapterConfig,
    LinearConfig,
    LowRankConfig,
    ParameterConfig,
    RankConfig,
)
from lora_func.errors import AdapterFileError, BusyModelError, FoldError, UnusedLeafError
from lora_func.export._attach import Attached, attach
from lora_func.export._merge import merge
from lora_func.files._adapters import load, save
from lora_func.files._training_state import TrainingState, load_training_state, save_training_state
from lora_func.initialization._init import init
from lora_func.runtime._call import adapted, fcall
from lora_func.runtime._running import skeleton
from lora_func.sweep._sweep import clip_grad_norm, vcall
from lora_func.targeting._targets import find_targets
from lora_func.variant import Params, Variant
from lora_func.variants import register
from lora_func.variants.antipasto import AntiPaSTO
from lora_func.variants.bitfit import BitFit
from lora_func.variants.delora import DeLoRA
from lora_func.variants.dora import DoRA
from lora_func.variants.eva import EVA
from lora_func.variants.full import Full
from lora_func.variants.hra import HRA
from lora_func.variants.ia3 import IA3
from lora_func.variants.ia3_ff import IA3FF
from lora_func.variants.lora import LoRA
from lora_func.variants.oft import OFT
from lora_func.variants.pissa import PiSSA
from lora_func.variants.road import ROAD
from lora_func.variants.shira import SHiRA
from lora_func.variants.ssteer import SSteer
from lora_func.variants.ssvd import SSVD
from lora_func.variants.vera import VeRA
from lora_func.weights._layers import Affine, Weight, dense, linear

__all__ = [
    "EVA",
    "HRA",
    "IA3",
    "IA3FF",
    "OFT",
    "ROAD",
    "SSVD",
    "AdapterConfig",
    "AdapterFileError",
    "Affine",
    "AntiPaSTO",
    "AsLoRA",
    "Attached",
    "BitFit",
    "BusyModelError",
    "DeLoRA",
    "DoRA",
    "FoldError",
    "Full",
    "LinearConfig",
    "LoRA",
    "LowRankConfig",
    "ParameterConfig",
    "Params",
    "PiSSA",
    "RankConfig",
    "SHiRA",
    "SSteer",
    "TrainingState",
    "UnusedLeafError",
    "Variant",
    "VeRA",
    "Weight",
    "adapted",
    "attach",
    "clip_grad_norm",
    "combine",
    "dense",
    "fcall",
    "find_targets",
    "init",
    "linear",
    "load",
    "load_training_state",
    "merge",
    "partition",
    "register",
    "save",
    "save_training_state",
    "skeleton",
    "stack",
    "summary",
    "to_lora",
    "unstack",
    "vcall",
]
