"""The overhead of a call and of the import.

    python -m nox -s bench -- overhead

The model has many linear layers but runs none of them, so ``fcall`` only parses, injects and
removes the adapter. The import is timed in new processes, after ``import torch``.
"""

import subprocess
import sys
from statistics import median

import torch
from measuring import Row, alternately, parser_of, report
from torch import nn
from tqdm import tqdm

import lora_func as lf


class Idle(nn.Module):
    """A model whose forward pass skips its layers."""

    def __init__(self, sites: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(sites)).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def measure(sites: int, options) -> Row:
    model, x = Idle(sites), torch.ones(1)
    params = lf.init(model, lf.LoRA(r=1))
    seconds = alternately(
        {"fcall": lambda: lf.fcall(model, params, x, strict=False)}, options.repeats
    )
    return {"what": f"fcall, {sites} sites", "µs/site": 1e6 * seconds["fcall"] / sites}


def imports(options) -> Row:
    lines = "import time, torch", "s = time.perf_counter()", "import lora_func"
    code = "; ".join([*lines, "print(time.perf_counter() - s)"])

    def once() -> float:
        done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
        return float(done.stdout)

    return {"what": "import", "s over torch": median(once() for _ in range(options.imports))}


def main() -> None:
    options = parser_of(__doc__, sites=[50, 200, 800], repeats=100, imports=10).parse_args()
    rows = [measure(sites, options) for sites in tqdm(options.sites, unit="size")]
    report("overhead", [*rows, imports(options)], ["µs/site"], options)


if __name__ == "__main__":
    main()
