"""The table of docs/testing.md: PEFT's methods against the laws."""

import warnings
from collections.abc import Callable, Iterable

import peft
from torch import nn

from lora_func.testing import LAWS, Law, Report, check_foreign

METHODS: dict[str, Callable[[int], peft.PeftConfig]] = {
    "LoRA": lambda r: peft.LoraConfig(r=r),
    "DoRA": lambda r: peft.LoraConfig(r=r, use_dora=True),
    "VeRA": lambda r: peft.VeraConfig(r=r),
    "IA3": lambda r: peft.IA3Config(feedforward_modules=[]),
    "DeLoRA": lambda r: peft.DeloraConfig(r=r),
    "ROAD": lambda r: peft.RoadConfig(group_size=2),
    "HRA": lambda r: peft.HRAConfig(r=r),
    "HRA, `apply_GS`": lambda r: peft.HRAConfig(r=r, apply_GS=True),
    "OFT": lambda r: peft.OFTConfig(r=0, oft_block_size=2, use_cayley_neumann=False),
    "OFT, Neumann": lambda r: peft.OFTConfig(r=0, oft_block_size=2, use_cayley_neumann=True),
    "BOFT": lambda r: peft.BOFTConfig(boft_block_size=2),
    "SHiRA": lambda r: peft.ShiraConfig(r=r),
    "LoHa": lambda r: peft.LoHaConfig(r=r),
    "LoKr": lambda r: peft.LoKrConfig(r=r),
    "C3A": lambda r: peft.C3AConfig(block_size=4),
    "MiSS": lambda r: peft.MissConfig(r=2),
    "FourierFT": lambda r: peft.FourierFTConfig(n_frequency=8),
    "RandLoRA": lambda r: peft.RandLoraConfig(r=r),
    "GraLoRA": lambda r: peft.GraloraConfig(r=2, gralora_k=2),
}
"""PEFT's config for a rank."""

DETACHED = {"DoRA": ("lora_A.default.weight", "lora_B.default.weight")}
"""Parameters whose gradient leaves a part out by the formula."""


def merged(module: nn.Module) -> nn.Linear:
    """Merge PEFT's module into its layer."""
    module.merge()
    return module.get_base_layer()


def report(method: str, laws: Iterable[Law] = LAWS) -> Report:
    """Check one of PEFT's methods."""

    def factory(layer: nn.Linear, r: int) -> nn.Module:
        config = METHODS[method](r)
        config.target_modules = {"0"}
        return peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return check_foreign(
            factory,
            name=method,
            merged=merged,
            detached=DETACHED.get(method, ()),
            start="close",
            batch_axes=(1, 2),
            fit=lambda d_in, d_out, r: (4 * d_in, 4 * d_out, 2 * r),
            laws=laws,
        )


def version() -> str:
    """The version of PEFT without its last part."""
    return peft.__version__.rpartition(".")[0]


def table() -> list[str]:
    """The laws that each method breaks."""
    rows = [f"| method of PEFT {version()} | laws that it breaks |", "|---|---|"]
    for method in METHODS:
        broken = ", ".join(f"`{law}`" for law in report(method).broken)
        rows.append(f"| {method} | {broken or '–'} |")
    return rows
