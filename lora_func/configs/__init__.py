"""What all configs share: which sites of a model they name, and ranks, scales and dropout by site.

The config of one method stands in its file in ``variants``.
"""

from lora_func.configs._base import AdapterConfig, Calibration, FrozenDict
from lora_func.configs._ranks import DropoutConfig, LowRankConfig, RankConfig, ScaledConfig
from lora_func.configs._sites import (
    ALL_LINEAR,
    LinearConfig,
    ParameterConfig,
    Patterns,
    Role,
)

__all__ = [
    "ALL_LINEAR",
    "AdapterConfig",
    "Calibration",
    "DropoutConfig",
    "FrozenDict",
    "LinearConfig",
    "LowRankConfig",
    "ParameterConfig",
    "Patterns",
    "RankConfig",
    "Role",
    "ScaledConfig",
]
