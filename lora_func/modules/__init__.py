"""Walking through a model: paths, tied parameters, structure, and parameters during a call.

What a weight means belongs to ``weights``; what runs a model belongs to ``runtime``.
"""

from lora_func.modules._paths import (
    attached_path,
    called_model,
    find_site,
    inner_model,
    named_parameters,
)
from lora_func.modules._places import Place, shared_parameters
from lora_func.modules._spread import (
    Sharding,
    check_not_flattened,
    is_partitioned,
    is_spread,
    old_sharding,
    sharding,
    whole,
)
from lora_func.modules._structure import Structure, identities, structure
from lora_func.modules._tracking import (
    AdaptedSource,
    AttachedView,
    ReadTracker,
    ReplacedParameters,
    inner_parameters,
    offloading_hook,
    original_parameters,
)

__all__ = [
    "AdaptedSource",
    "AttachedView",
    "Place",
    "ReadTracker",
    "ReplacedParameters",
    "Sharding",
    "Structure",
    "attached_path",
    "called_model",
    "check_not_flattened",
    "find_site",
    "identities",
    "inner_model",
    "inner_parameters",
    "is_partitioned",
    "is_spread",
    "named_parameters",
    "offloading_hook",
    "old_sharding",
    "original_parameters",
    "sharding",
    "shared_parameters",
    "structure",
    "whole",
]
