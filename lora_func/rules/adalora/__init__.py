"""AdaLoRA's schedule: scores of singular triplets, a budget over all sites, and masks.

Each function takes leaves of ``lf.AdaLoRA``, of one adapter or of a stack of K that train in
lockstep; the K have scores and masks of their own. ``update`` does all of it after an optimizer's
step.

References:
    https://arxiv.org/abs/2303.10512, eq. 8-11 and alg. 1. Code: QingruZhang/AdaLoRA,
    huggingface/peft ``tuners/adalora/layer.py``.
"""

from lora_func.rules.adalora._schedule import Schedule, budget, update
from lora_func.rules.adalora._scores import (
    allocate,
    importance,
    mask,
    orthogonality,
    triplet_scores,
)

__all__ = [
    "Schedule",
    "allocate",
    "budget",
    "importance",
    "mask",
    "orthogonality",
    "triplet_scores",
    "update",
]
