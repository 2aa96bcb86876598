"""LoRA-family adapters as pure functions on torch.func.

``params = init(model, cfg); loss = fcall(model, params, batch)``

The public names stand here. Each package below says in its docstring what belongs there.
"""

from lora_func import peft, rules
from lora_func.adapter import combine, partition, project, stack, summary, unstack
from lora_func.configs import (
    AdapterConfig,
    DropoutConfig,
    LinearConfig,
    LowRankConfig,
    ParameterConfig,
    RankConfig,
    ScaledConfig,
)
from lora_func.errors import AdapterFileError, BusyModelError, FoldError, UnusedLeafError
from lora_func.export import AsLoRA, Attached, attach, merge, to_lora
from lora_func.files import TrainingState, load, load_training_state, save, save_training_state
from lora_func.graphs import Captured, capture
from lora_func.initialization import init, loftq, nf4
from lora_func.runtime import adapted, fcall, skeleton
from lora_func.sweep import calibrate_strength, clip_grad_norm, vcall
from lora_func.targeting import Target, Targets, find_targets
from lora_func.variant import (
    ApplyFn,
    BiasFn,
    ConcludeFn,
    InitFn,
    JoinFn,
    LowRankFn,
    NormFn,
    ObserveFn,
    ParametersFn,
    Params,
    PeftFormat,
    PeftLeaf,
    PrepareFn,
    ProjectFn,
    SharedFn,
    Trial,
    Variant,
    WeightFn,
)
from lora_func.variants import *  # noqa: F403 - the configs, listed in the table
from lora_func.variants import __all__ as _variants
from lora_func.version import __version__
from lora_func.weights import Affine, Weight, dense, linear

__all__ = [
    "AdapterConfig",
    "AdapterFileError",
    "Affine",
    "ApplyFn",
    "AsLoRA",
    "Attached",
    "BiasFn",
    "BusyModelError",
    "Captured",
    "ConcludeFn",
    "DropoutConfig",
    "FoldError",
    "InitFn",
    "JoinFn",
    "LinearConfig",
    "LowRankConfig",
    "LowRankFn",
    "NormFn",
    "ObserveFn",
    "ParameterConfig",
    "ParametersFn",
    "Params",
    "PeftFormat",
    "PeftLeaf",
    "PrepareFn",
    "ProjectFn",
    "RankConfig",
    "ScaledConfig",
    "SharedFn",
    "Target",
    "Targets",
    "TrainingState",
    "Trial",
    "UnusedLeafError",
    "Variant",
    "Weight",
    "WeightFn",
    "__version__",
    "adapted",
    "attach",
    "calibrate_strength",
    "capture",
    "clip_grad_norm",
    "combine",
    "dense",
    "fcall",
    "find_targets",
    "init",
    "linear",
    "load",
    "load_training_state",
    "loftq",
    "merge",
    "nf4",
    "partition",
    "peft",
    "project",
    "rules",
    "save",
    "save_training_state",
    "skeleton",
    "stack",
    "summary",
    "to_lora",
    "unstack",
    "vcall",
]
__all__ += _variants
