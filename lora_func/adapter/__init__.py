"""The dict that is an adapter: its keys, the check of its leaves, stacks, sums, and the summary.

Functions here work on the dict alone, or read weights by their paths. What runs a model belongs to
``runtime``.
"""

from lora_func.adapter._combine import combine
from lora_func.adapter._keys import (
    RANK,
    SHARED,
    Key,
    as_trainable,
    check_adapter,
    group,
    parse,
    partition,
)
from lora_func.adapter._merging import METHODS
from lora_func.adapter._project import project
from lora_func.adapter._schema import check_leaves, check_required, check_site
from lora_func.adapter._stack import holds_stack, pad_axes, size_of, stack, unstack
from lora_func.adapter._summary import end_of_path, summary

__all__ = [
    "METHODS",
    "RANK",
    "SHARED",
    "Key",
    "as_trainable",
    "check_adapter",
    "check_leaves",
    "check_required",
    "check_site",
    "combine",
    "end_of_path",
    "group",
    "holds_stack",
    "pad_axes",
    "parse",
    "partition",
    "project",
    "size_of",
    "stack",
    "summary",
    "unstack",
]
