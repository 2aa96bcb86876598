"""Rules of training for the factors of a LoRA, as pure functions over the dict.

A rule of gradients turns ``(params, grads)`` into grads, for any optimizer that follows; a rule of
steps turns ``(params, grads, state)`` into ``(params, state)``. Both take an adapter, or a stack of
K of them, and treat each of the K by itself. They act on every site that has factors A and B and a
scale; the other leaves pass through. ``adalora`` has the functions of AdaLoRA's schedule.
"""

from lora_func.rules import adalora
from lora_func.rules._balance import balance
from lora_func.rules._gradients import lora_fa, lora_pro, riemannian
from lora_func.rules._leaves import assign, gradients, per_member
from lora_func.rules._muon import lora_muon
from lora_func.rules._rates import groups, lora_plus
from lora_func.rules._rite import lora_rite

__all__ = [
    "adalora",
    "assign",
    "balance",
    "gradients",
    "groups",
    "lora_fa",
    "lora_muon",
    "lora_plus",
    "lora_pro",
    "lora_rite",
    "per_member",
    "riemannian",
]
