"""Mathematics that variants share: products, dropout, SVD, rotations, sparse entries, moments.

Functions here take tensors and frozen weights. What belongs to one method alone stands in its file
in ``variants``.
"""

from lora_func.numerics._dense import add_dense
from lora_func.numerics._dropout import DROPOUT, dropout, dropout_leaf, dropout_setting
from lora_func.numerics._entries import add_entries, prepare_entries, weight_with_entries
from lora_func.numerics._gradients import WeightGradient, join_gradients, observe_gradient
from lora_func.numerics._linalg import (
    SINGULAR,
    along_rows,
    at_least_float32,
    check_rank,
    generator_for,
    kaiming_uniform,
    low_rank_difference,
    low_rank_norm,
    svd,
    two_divisors,
    without_autocast,
)
from lora_func.numerics._moments import (
    Components,
    Moments,
    join_moments,
    observe_moments,
    principal_components,
)
from lora_func.numerics._products import (
    add_low_rank,
    add_scaled,
    is_eager,
    low_rank_term,
    scale_output,
    scaled,
)
from lora_func.numerics._rotations import cayley, rotate_blocks, skew

__all__ = [
    "DROPOUT",
    "SINGULAR",
    "Components",
    "Moments",
    "WeightGradient",
    "add_dense",
    "add_entries",
    "add_low_rank",
    "add_scaled",
    "along_rows",
    "at_least_float32",
    "cayley",
    "check_rank",
    "dropout",
    "dropout_leaf",
    "dropout_setting",
    "generator_for",
    "is_eager",
    "join_gradients",
    "join_moments",
    "kaiming_uniform",
    "low_rank_difference",
    "low_rank_norm",
    "low_rank_term",
    "observe_gradient",
    "observe_moments",
    "prepare_entries",
    "principal_components",
    "rotate_blocks",
    "scale_output",
    "scaled",
    "skew",
    "svd",
    "two_divisors",
    "weight_with_entries",
    "without_autocast",
]
