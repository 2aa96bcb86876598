"""Every variant of the library in one step: a race on identical batches.

    python examples/variants_race.py
    python examples/variants_race.py --variants lora,dora,hra,ia3

Each variant is one adapter, with its own linear head if the task has one. One call of the frozen
model gives the losses of all adapters. One optimizer trains them, each at its own learning rate.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from probe import VARIANTS, add_variants, groups_of, make
from rich import box
from rich.console import Console
from rich.table import Table
from tasks import Task, accuracies, classify, in_epochs, parser_of, smoothed
from tqdm import tqdm

import lora_func as lf

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plots import finish, line


def optimizer_of(adapters: dict[str, lf.Params]) -> torch.optim.Optimizer:
    rates = {name: VARIANTS[name].trial.lr for name in adapters}
    groups = [group for name in adapters for group in groups_of(adapters[name], rates[name])]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def race(task: Task, adapters: dict[str, lf.Params], epochs: int, seed: int) -> torch.Tensor:
    """Train all adapters in place; return their losses, (steps, adapters)."""
    optimizer, curves = optimizer_of(adapters), []
    with tqdm(in_epochs(task.data, epochs, seed), desc="race", unit="step") as progress:
        for batch in progress:
            optimizer.zero_grad()
            stacks = [lf.stack([params]) for params in adapters.values()]
            losses = lf.vcall(task.model, stacks, batch)
            losses.sum().backward()
            lf.clip_grad_norm([*adapters.values()], max_norm=1.0, model=task.model)
            optimizer.step()
            curves.append(losses.detach())
            first = [*adapters][losses.argmin()]
            progress.set_postfix(first=first, loss=f"{losses.min().item():.3f}")
    return torch.stack(curves)


def table(names: Sequence[str], curves: torch.Tensor, accuracy: torch.Tensor, title: str) -> Table:
    shown = Table(title=title, box=box.SIMPLE)
    for column in ("place", "variant", "first loss", "last loss", "held-out accuracy"):
        shown.add_column(column, justify="left" if column == "variant" else "right")
    first, last = curves[:5].mean(0), curves[-5:].mean(0)
    for place, k in enumerate(accuracy.argsort(descending=True).tolist(), 1):
        shown.add_row(
            str(place), names[k], f"{first[k]:.2f}", f"{last[k]:.2f}", f"{accuracy[k]:.1%}"
        )
    return shown


def plot(names: Sequence[str], curves: torch.Tensor, accuracy: torch.Tensor, path: Path) -> None:
    columns = 1 + len(names) // 24
    figure, axes = plt.subplots(figsize=(7 + 3 * columns, 6), layout="constrained")
    for i, k in enumerate(accuracy.argsort(descending=True).tolist()):
        label = f"{names[k]}, {accuracy[k]:.1%}"
        axes.plot(smoothed(curves[:, k].tolist(), 5), label=label, **line(i, len(names)))
    axes.set(
        xlabel="step", ylabel="training loss (mean of five steps)", title="One step trains all"
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), ncols=columns, fontsize=7)
    finish(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the race; return the exit status."""
    small = {"epochs": 1, "packages": 6, "most": 50, "length": 24, "batch_size": 8}
    parser = parser_of(__doc__, "race.png", **small)
    add_variants(parser, "all")
    options = parser.parse_args(arguments)
    names = options.variants

    task = classify(options)
    adapters = {
        name: make(task, VARIANTS[name], options.seed)
        for name in tqdm(names, desc="init", unit="variant")
    }
    curves = race(task, adapters, options.epochs, options.seed)
    stacks = [lf.stack([params]) for params in adapters.values()]
    accuracy = torch.tensor(accuracies(task, stacks))
    Console(width=max(100, Console().width)).print(table(names, curves, accuracy, task.title))
    plot(names, curves, accuracy, options.plot)
    print(f"loss curves: {options.plot.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
