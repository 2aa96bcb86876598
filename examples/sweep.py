"""A grid of ranks, alphas, learning rates and seeds, trained together on one frozen MiniLM.

    python examples/sweep.py
    python examples/sweep.py --ranks 4,16,64 --lrs 3e-4,1e-3,3e-3
    python examples/sweep.py --halving          # drop the worse half three times

Each adapter is a LoRA with its own linear head. The task: which package of the standard library
does a docstring document? One step trains all adapters: the base runs once on the rows of all
adapters. Each adapter has its own loss, learning rate and clipping, and equals a solo run. A table,
a heat map and loss curves show the grid. The best adapter is saved.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean

import matplotlib
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tasks import Task, accuracies, classify, in_epochs, numbers, parser_of, smoothed
from tqdm import tqdm

import lora_func as lf

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plots import finish, line


@dataclass
class Member:
    """One adapter of the sweep."""

    rank: int
    alpha: float
    lr: float
    seed: int
    params: lf.Params = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    @property
    def recent(self) -> float:
        return mean(self.losses[-10:])


def members_of(task: Task, grid: dict[str, Sequence[float]]) -> list[Member]:
    members = [Member(*settings) for settings in product(*grid.values())]
    for member in members:
        lora = lf.LoRA(r=member.rank, alpha=member.alpha, layers=task.layers)
        member.params = lf.init(task.model, [lora, task.head], seed=member.seed)
    return members


def optimizer_of(members: Sequence[Member]) -> torch.optim.Optimizer:
    """One optimizer with a parameter group for each adapter."""
    return torch.optim.AdamW(
        {"params": list(lf.partition(member.params)[0].values()), "lr": member.lr}
        for member in members
    )


def train(task: Task, members: list[Member], epochs: int, seed: int, halving: bool) -> None:
    """Train in place; with halving, the worse half stops at 1/4, 1/2 and 3/4 of the steps."""
    batches, optimizer = in_epochs(task.data, epochs, seed), optimizer_of(members)
    with tqdm(batches, desc="sweep", unit="step") as progress:
        for step, batch in enumerate(progress):
            optimizer.zero_grad()
            adapters = [member.params for member in members]
            losses = lf.vcall(task.model, lf.stack(adapters), batch)
            losses.sum().backward()
            lf.clip_grad_norm(adapters, max_norm=1.0)
            optimizer.step()
            for member, loss in zip(members, losses.tolist(), strict=True):
                member.losses.append(loss)
            if halving and len(members) > 1 and step in quarters(len(batches)):
                members = sorted(members, key=lambda m: m.recent)[: (len(members) + 1) // 2]
                moments = dict(optimizer.state)
                optimizer = optimizer_of(members)
                leaves = [leaf for group in optimizer.param_groups for leaf in group["params"]]
                optimizer.state.update({leaf: moments[leaf] for leaf in leaves})
            progress.set_postfix(adapters=len(members), best=f"{losses.min().item():.3f}")


def quarters(steps: int) -> set[int]:
    return {steps * i // 4 - 1 for i in (1, 2, 3)}


def judge(task: Task, members: Sequence[Member]) -> None:
    """Compute the held-out accuracy of each member."""
    stacks = [lf.stack([member.params for member in members])]
    for member, accuracy in zip(members, accuracies(task, stacks, chunk=8), strict=True):
        member.accuracy = accuracy


def table(members: Sequence[Member], title: str) -> Table:
    shown = Table(title=title, box=box.SIMPLE)
    for column in ("rank", "alpha", "lr", "seed", "steps", "loss", "held-out accuracy"):
        shown.add_column(column, justify="right")
    best = max(members, key=lambda m: m.accuracy)
    for member in sorted(members, key=lambda m: -m.accuracy):
        cells = (member.rank, member.alpha, member.lr, member.seed, len(member.losses))
        style = "bold" if member is best else None
        shown.add_row(
            *(f"{cell:g}" for cell in cells),
            f"{member.recent:.3f}",
            f"{member.accuracy:.1%}",
            style=style,
        )
    return shown


def oldest(members: Sequence[Member]) -> list[Member]:
    """The members that trained for the most steps; halving stops others before."""
    most = max(len(member.losses) for member in members)
    return [member for member in members if len(member.losses) == most]


def plot(members: Sequence[Member], path: Path) -> None:
    """Plot the grid (mean over the seeds that lasted longest) and every loss curve."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    rows = sorted({(m.rank, m.alpha) for m in members})
    lrs = sorted({m.lr for m in members})
    cells = [
        [oldest([m for m in members if (m.rank, m.alpha, m.lr) == (*row, lr)]) for lr in lrs]
        for row in rows
    ]
    values = [[mean(m.accuracy for m in cell) for cell in row] for row in cells]
    image = left.imshow(values, aspect="auto", cmap="cividis")
    for i, j in product(range(len(rows)), range(len(lrs))):
        text = f"{values[i][j]:.1%}\n{len(cells[i][j])} x {len(cells[i][j][0].losses)} steps"
        ink = "black" if image.norm(values[i][j]) > 0.5 else "white"
        left.text(j, i, text, ha="center", va="center", color=ink)
    left.set_xticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
    left.set_yticks(range(len(rows)), [f"r {rank}, alpha {alpha:g}" for rank, alpha in rows])
    left.set(xlabel="learning rate", title="held-out accuracy, mean over seeds of one age")
    figure.colorbar(image, ax=left)
    looks = {lr: line(i, len(lrs)) for i, lr in enumerate(lrs)}
    for member in members:
        right.plot(smoothed(member.losses), alpha=0.7, **looks[member.lr])
    for lr, look in looks.items():
        right.plot([], [], label=f"lr {lr:g}", **look)
    right.set(xlabel="step", ylabel="training loss (mean of ten steps)", title="every adapter")
    right.legend()
    finish(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep; return the exit status."""
    small = {"epochs": 1, "packages": 6, "most": 80, "length": 40, "batch_size": 16}
    parser = parser_of(__doc__, "sweep.png", **small)
    parser.add_argument("--ranks", type=numbers(int), default=[4, 16])
    parser.add_argument("--alphas", type=numbers(float), default=[8.0, 32.0])
    parser.add_argument("--lrs", type=numbers(float), default=[1e-3, 5e-3])
    parser.add_argument("--seeds", type=numbers(int), default=[0, 1])
    parser.add_argument("--halving", action="store_true", help="drop the worse half three times")
    parser.add_argument("--save", type=Path, default=Path("best.safetensors"))
    options = parser.parse_args(arguments)

    task = classify(options)
    grid = {
        "rank": options.ranks,
        "alpha": options.alphas,
        "lr": options.lrs,
        "seed": options.seeds,
    }
    members = members_of(task, grid)
    train(task, members, options.epochs, options.seed, options.halving)
    judge(task, members)
    Console(width=max(100, Console().width)).print(table(members, task.title))
    plot(members, options.plot)
    best = max(members, key=lambda m: m.accuracy)
    lf.save(best.params, options.save, model=task.model)
    print(f"the grid: {options.plot.resolve()}; the best adapter: {options.save.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
