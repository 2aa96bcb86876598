"""What a variant is: its functions, their protocols, and the types of its other fields.

Everything that belongs to one method is a field of its ``Variant``: its functions, the axes of its
leaves, PEFT's format, how it is summed, and the settings with which it is tried. The methods
themselves stand in ``variants``.
"""

from lora_func.variant._axes import fit, parse_axes
from lora_func.variant._peft_format import (
    CONVOLUTIONS,
    PeftFormat,
    PeftLeaf,
    differs_in_padding,
    differs_on_convolution,
    matches_path,
)
from lora_func.variant._prepare import prepare_sites, prepared
from lora_func.variant._protocols import (
    ApplyFn,
    BiasFn,
    ConcludeFn,
    InitFn,
    JoinFn,
    LowRankFn,
    NormFn,
    ObserveFn,
    ParametersFn,
    PrepareFn,
    ProjectFn,
    SharedFn,
    WeightFn,
)
from lora_func.variant._variant import (
    Family,
    Params,
    Trial,
    Variant,
    check_variant,
    rank_of,
    ranks_of,
)

__all__ = [
    "CONVOLUTIONS",
    "ApplyFn",
    "BiasFn",
    "ConcludeFn",
    "Family",
    "InitFn",
    "JoinFn",
    "LowRankFn",
    "NormFn",
    "ObserveFn",
    "ParametersFn",
    "Params",
    "PeftFormat",
    "PeftLeaf",
    "PrepareFn",
    "ProjectFn",
    "SharedFn",
    "Trial",
    "Variant",
    "WeightFn",
    "check_variant",
    "differs_in_padding",
    "differs_on_convolution",
    "fit",
    "matches_path",
    "parse_axes",
    "prepare_sites",
    "prepared",
    "rank_of",
    "ranks_of",
]
