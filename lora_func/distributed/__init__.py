"""Adapters over the ranks of torch.distributed: ``synced``, ``share`` and ``gathered``.

There is no launcher and no trainer here: torchrun starts the ranks, and the training loop is the
user's. How a model on several devices runs belongs to ``runtime``.
"""

from lora_func.distributed._members import gathered, share
from lora_func.distributed._synced import synced

__all__ = ["gathered", "share", "synced"]
