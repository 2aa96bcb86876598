"""Sweeps: K adapters in one call of one frozen model.

The batches of K adapters, their results, the choice between one call and a loop, and the
verification that a model keeps rows apart belong here. How a module runs K adapters belongs to
``runtime``.
"""

from lora_func.sweep._clipping import clip_grad_norm
from lora_func.sweep._strength import calibrate_strength
from lora_func.sweep._sweep import vcall

__all__ = ["calibrate_strength", "clip_grad_norm", "vcall"]
