"""The overhead of a call and of the import.

    python -m nox -s bench -- overhead

The model has many linear layers. Idle, it runs none of them, so ``fcall`` only parses, injects and
removes the adapter; running, it calls all of them, each a product of 2 x 2. The import is timed in
new processes, after ``import torch``.
"""

import subprocess
import sys
from itertools import islice
from statistics import median

import torch
from measuring import Row, alternately, parser_of, report
from torch import nn
from tqdm import tqdm

import lora_func as lf


class Layers(nn.Module):
    """A model of linear layers, of which its forward pass runs some."""

    def __init__(self, sites: int, running: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(sites)).requires_grad_(False)
        self.running = running

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in islice(self.layers, self.running):
            x = layer(x)
        return x


@torch.no_grad()
def measure(sites: int, options) -> Row:
    models, x = {"idle": Layers(sites, 0), "running": Layers(sites, sites)}, torch.ones(1, 2)
    params = lf.init(models["idle"], lf.LoRA(r=1))
    calls = {
        name: lambda model=model: lf.fcall(model, params, x, strict=False)
        for name, model in models.items()
    }
    seconds = alternately(calls, options.repeats)
    each = {f"{name}, µs/site": 1e6 * taken / sites for name, taken in seconds.items()}
    return {"what": f"fcall, {sites} sites", **each}


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
    report("overhead", [*rows, imports(options)], ["idle, µs/site"], options)


if __name__ == "__main__":
    main()
