"""A hypernetwork: a network that computes an adapter from a description of the task.

    python examples/hypernetwork.py

Each task is a sine wave, described by amplitude and phase. The frozen base has learnt the mean of
all waves. The hypernetwork computes the leaves of one LoRA per task. One call runs the base with
all adapters, each on its own points, and the gradient flows back to the hypernetwork.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from tasks import mean_of_sines, sines
from torch import Tensor, nn
from tqdm import tqdm

import lora_func as lf

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plots import finish, line


class Hypernetwork(nn.Module):
    """Map descriptions (tasks, 2) to a stack of adapters with the shapes of a given adapter."""

    def __init__(self, like: lf.Params, width: int = 64) -> None:
        super().__init__()
        trained, self.constants = lf.partition(like)
        self.start = {key: leaf.detach() for key, leaf in trained.items()}
        self.trunk = nn.Sequential(
            nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        numbers = sum(leaf.numel() for leaf in self.start.values())
        self.write = nn.Linear(width, numbers)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def forward(self, description: Tensor) -> lf.Params:
        tasks, sizes = len(description), [leaf.numel() for leaf in self.start.values()]
        written = self.write(self.trunk(description)).split(sizes, dim=1)
        leaves = {
            key: leaf + part.view(tasks, *leaf.shape)
            for (key, leaf), part in zip(self.start.items(), written, strict=True)
        }
        constants = {key: leaf.expand(tasks, *leaf.shape) for key, leaf in self.constants.items()}
        return {**leaves, **constants}


def losses(model: nn.Module, params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The loss of each adapter on its task's points, (tasks,)."""
    outputs = lf.vcall(model, params, x, batched=True)
    return F.mse_loss(outputs, y, reduction="none").mean((1, 2))


def train(model: nn.Module, network: Hypernetwork, options) -> list[float]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    generator, curve = torch.Generator().manual_seed(options.seed), []
    with tqdm(range(options.steps), desc="hypernetwork", unit="step") as progress:
        for _ in progress:
            optimizer.zero_grad()
            x, y, description = sines(options.tasks, 20, generator)
            loss = losses(model, network(description), x, y).sum() / options.tasks
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return curve


def plot(model: nn.Module, network: Hypernetwork, curve: Sequence[float], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(curve, color="black")
    left.set(xlabel="step", ylabel="loss", yscale="log")
    grid = torch.linspace(-5, 5, 100)[:, None]
    descriptions = torch.tensor([[1.0, 0.0], [3.0, 1.0], [4.5, 2.0]])
    with torch.no_grad():
        waves = lf.vcall(model, network(descriptions), grid)
    for i, ((amplitude, phase), wave) in enumerate(zip(descriptions, waves, strict=True)):
        look = line(i, len(waves))
        right.plot(grid, amplitude * torch.sin(grid + phase), color=look["color"], alpha=0.4, lw=4)
        right.plot(grid, wave, label=f"amplitude {amplitude:g}, phase {phase:g}", **look)
    right.set(title="true waves (pale) and outputs with the generated adapters")
    right.legend()
    finish(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the hypernetwork; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tasks", type=int, default=32, help="tasks per step")
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("hypernetwork.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = mean_of_sines(options.base_steps, generator)
    cfg = [lf.LoRA(r=8, target_modules="2"), lf.Full(target_parameters=r"^[04]\.")]
    network = Hypernetwork(lf.init(model, cfg, seed=options.seed))
    curve = train(model, network, options)
    x, y, description = sines(200, 50, generator)
    with torch.no_grad():
        base = F.mse_loss(model(x), y).item()
        written = losses(model, network(description), x, y).mean().item()
    shown = Table(title="loss on 200 new waves", box=box.SIMPLE)
    for column in ("the frozen base", "with the generated adapters"):
        shown.add_column(column, justify="right")
    shown.add_row(f"{base:.3f}", f"{written:.3f}")
    Console(width=max(80, Console().width)).print(shown)
    plot(model, network, curve, options.plot)
    print(f"curves: {options.plot.resolve()}")
    return int(not written < base)


if __name__ == "__main__":
    sys.exit(main())
