"""How frozen layers store their weights: dense, transposed, or quantised by bitsandbytes.

Every other package sees a frozen layer as the affine map ``x -> x Wᵀ + b`` with ``W`` of shape
(d_out, d_in), and reads it through ``linear``, ``matmul_weight`` and ``dense`` alone. A new storage
is a new module here. What an adapter does to a weight belongs to ``variants``.
"""

from lora_func.weights._affine import (
    Affine,
    Weight,
    bias_of,
    dense,
    is_stack,
    linear,
    looks_up,
    matmul_weight,
    matrices,
    taps_of,
)
from lora_func.weights._bitsandbytes import (
    is_packed,
    is_quantised,
    is_quantised_state,
    is_unknown_quantised,
    mixes_rows,
    numel_of,
    packed,
    without_rounding,
)
from lora_func.weights._layers import (
    affine,
    bias_name,
    check_not_computed,
    has_matrix,
    is_conv1d,
    is_linear,
    matrix,
    restore_layout,
    weight_at,
)
from lora_func.weights._offloaded import device_of_module, is_offloaded, loaded

__all__ = [
    "Affine",
    "Weight",
    "affine",
    "bias_name",
    "bias_of",
    "check_not_computed",
    "dense",
    "device_of_module",
    "has_matrix",
    "is_conv1d",
    "is_linear",
    "is_offloaded",
    "is_packed",
    "is_quantised",
    "is_quantised_state",
    "is_stack",
    "is_unknown_quantised",
    "linear",
    "loaded",
    "looks_up",
    "matmul_weight",
    "matrices",
    "matrix",
    "mixes_rows",
    "numel_of",
    "packed",
    "restore_layout",
    "taps_of",
    "weight_at",
    "without_rounding",
]
