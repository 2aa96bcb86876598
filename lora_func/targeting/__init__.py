"""Which sites of a model a config names: by patterns, layers and roles.

What happens at a site belongs to ``runtime`` and ``initialization``.
"""

from lora_func.targeting._targets import Target, Targets, find_targets

__all__ = ["Target", "Targets", "find_targets"]
