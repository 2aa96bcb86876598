"""LoRA-family adapters as pure functions on torch.func.

``params = init(model, cfg); loss = fcall(model, params, batch)``

The public names stand here. Each package below says in its docstring what belongs there.
"""

from lora_func import peft
from lora_func.adapter import combine, partition, stack, summary, unstack
from lora_func.configs import (
    AdapterConfig,
    LinearConfig,
    LowRankConfig,
    ParameterConfig,
    RankConfig,
)
from lora_func.errors import AdapterFileError, BusyModelError, FoldError, UnusedLeafError
from lora_func.export import AsLoRA, Attached, attach, merge, to_lora
from lora_func.files import TrainingState, load, load_training_state, save, save_training_state
from lora_func.initialization import init
from lora_func.runtime import adapted, fcall, skeleton
from lora_func.sweep import clip_grad_norm, vcall
from lora_func.targeting import Target, Targets, find_targets
from lora_func.variant import (
    ApplyFn,
    BiasFn,
    ConcludeFn,
    InitFn,
    LowRankFn,
    NormFn,
    ObserveFn,
    ParametersFn,
    Params,
    PeftFormat,
    PeftLeaf,
    SharedFn,
    Trial,
    Variant,
    WeightFn,
)
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
from lora_func.version import __version__
from lora_func.weights import Affine, Weight, dense, linear

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
    "ApplyFn",
    "AsLoRA",
    "Attached",
    "BiasFn",
    "BitFit",
    "BusyModelError",
    "ConcludeFn",
    "DeLoRA",
    "DoRA",
    "FoldError",
    "Full",
    "InitFn",
    "LinearConfig",
    "LoRA",
    "LowRankConfig",
    "LowRankFn",
    "NormFn",
    "ObserveFn",
    "ParameterConfig",
    "ParametersFn",
    "Params",
    "PeftFormat",
    "PeftLeaf",
    "PiSSA",
    "RankConfig",
    "SHiRA",
    "SSteer",
    "SharedFn",
    "Target",
    "Targets",
    "TrainingState",
    "Trial",
    "UnusedLeafError",
    "Variant",
    "VeRA",
    "Weight",
    "WeightFn",
    "__version__",
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
    "peft",
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
