"""Running a frozen model with an adapter: ``fcall``, ``adapted``, ``skeleton``.

The layout of an adapter in a model, the injection of other forwards and parameters for one call,
transforms and checkpointing belong here. K adapters in one call use the same injection; their
batches and their verification belong to ``sweep``.
"""

from lora_func.runtime._agreement import (
    check_same_depth,
    is_sharded,
    largest,
    refused_together,
)
from lora_func.runtime._batch import LossFn, arguments, result
from lora_func.runtime._call import adapted, call, fcall
from lora_func.runtime._checks import check_single, check_unattached, stack_size
from lora_func.runtime._injection import injection
from lora_func.runtime._layout import ModelLayout, devices_of, layout_of, present, remember
from lora_func.runtime._leaves import leaves_of
from lora_func.runtime._losses import Rows
from lora_func.runtime._operands import Operand
from lora_func.runtime._overrides import ForwardOverride, check_used, override_forward
from lora_func.runtime._patches import Patch, patched
from lora_func.runtime._replacements import Replacement, replacements
from lora_func.runtime._running import check_idle, eval_patches, skeleton
from lora_func.runtime._settings import has_fast_path, settings_now, unread_masks
from lora_func.runtime._site import Site
from lora_func.runtime._trees import PLAIN, PerAdapter, joined, stacked, tensors_of, unstacked
from lora_func.runtime._views import (
    adapted_bias,
    adapted_weight,
    check_no_dropout,
    dense_parameters,
    effective_parameters,
    name_for_bias,
    weight_view,
)

__all__ = [
    "PLAIN",
    "ForwardOverride",
    "LossFn",
    "ModelLayout",
    "Operand",
    "Patch",
    "PerAdapter",
    "Replacement",
    "Rows",
    "Site",
    "adapted",
    "adapted_bias",
    "adapted_weight",
    "arguments",
    "call",
    "check_idle",
    "check_no_dropout",
    "check_same_depth",
    "check_single",
    "check_unattached",
    "check_used",
    "dense_parameters",
    "devices_of",
    "effective_parameters",
    "eval_patches",
    "fcall",
    "has_fast_path",
    "injection",
    "is_sharded",
    "joined",
    "largest",
    "layout_of",
    "leaves_of",
    "name_for_bias",
    "override_forward",
    "patched",
    "present",
    "refused_together",
    "remember",
    "replacements",
    "result",
    "settings_now",
    "skeleton",
    "stack_size",
    "stacked",
    "tensors_of",
    "unread_masks",
    "unstacked",
    "weight_view",
]
