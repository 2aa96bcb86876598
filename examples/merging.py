"""Sums of two adapters: which way keeps what both have learnt?

    python examples/merging.py
    python examples/merging.py --density 0.3

Two LoRAs learn from disjoint halves of the packages. Both change one frozen MiniLM, and their heads
have rows for all packages. ``combine`` adds them in each way that it knows. Each way gives a sum of
another size, so ``calibrate_strength`` also scales all of them to the distance from the base that
the plain sum has. The table shows the held-out accuracy before and after.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from probe import groups_of
from rich import box
from rich.console import Console
from rich.table import Table
from tasks import Batch, Task, accuracies, classify, in_epochs, parser_of
from tqdm import tqdm

import lora_func as lf
from lora_func.adapter import METHODS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plots import finish


@dataclass
class Row:
    """A sum, and its accuracy as it is and at the distance of the plain sum."""

    name: str
    plain: float
    strength: float
    scaled: float


def of_packages(data: Sequence[Batch], packages: Sequence[int]) -> list[Batch]:
    """The rows of some packages alone."""
    wanted, found = torch.tensor(packages), []
    for batch in data:
        rows = torch.isin(batch["labels"], wanted)
        if rows.any():
            found.append({key: tensor[rows] for key, tensor in batch.items()})
    return found


def train(task: Task, halves: Sequence[Sequence[int]], options: Namespace) -> list[lf.Params]:
    """Train a shared head first, then a LoRA on each half."""
    head = lf.init(task.model, task.head, seed=options.seed)
    loras = [lf.init(task.model, lf.LoRA(r=8, layers=task.layers)) for _ in halves]
    runs = [("head", head, {}, task.data)]
    runs += [
        (f"half {i}", lora, head, of_packages(task.data, half))
        for i, (lora, half) in enumerate(zip(loras, halves, strict=True))
    ]
    for name, params, fixed, data in runs:
        optimizer = torch.optim.AdamW(groups_of(params, options.lr), weight_decay=0.0)
        for batch in tqdm(in_epochs(data, options.epochs, options.seed), name, unit="step"):
            optimizer.zero_grad()
            lf.fcall(task.model, {**params, **fixed}, batch).backward()
            optimizer.step()
    task.model.load_state_dict(lf.merge(task.model, head, finite=True))
    return loras


def judge(task: Task, loras: Sequence[lf.Params], options: Namespace) -> list[Row]:
    """Add the adapters in each way, as they are and at the distance of the plain sum."""
    data, rows = task.data[: options.batches], []
    target = distance(task, lf.combine([(one, 1.0) for one in loras]), data)
    print(f"the plain sum is {target:.3f} nats from the base")
    for method in tqdm(METHODS, "sums", unit="way"):
        density = options.density if any(n in method for n in ("ties", "dare", "prune")) else None
        merged = lf.combine([(one, 1.0) for one in loras], method, density=density)
        scaled, strength = lf.calibrate_strength(
            task.model, merged, data, target_kl=target, tol=0.05
        )
        plain, after = accuracies(task, [lf.stack([merged, scaled])])
        rows.append(Row(method, plain, strength.item(), after))
    return rows


def distance(task: Task, params: lf.Params, data: Sequence[Batch]) -> float:
    """The mean divergence of the adapted model's predictions from the base's."""
    total, rows = 0.0, 0
    with torch.no_grad():
        for batch in data:
            base = task.model(**batch).logits.log_softmax(-1)
            logits = lf.fcall(task.model, params, batch, loss_fn=lambda output, _: output.logits)
            total += (base.exp() * (base - logits.log_softmax(-1))).sum().item()
            rows += len(base)
    return total / rows


def table(rows: Sequence[Row], title: str) -> Table:
    shown = Table(title=title, box=box.SIMPLE)
    for column in ("sum", "accuracy", "strength", "accuracy at that strength"):
        shown.add_column(column, justify="left" if column == "sum" else "right")
    for row in sorted(rows, key=lambda row: -row.scaled):
        cells = (f"{row.plain:.1%}", f"{row.strength:.2f}", f"{row.scaled:.1%}")
        shown.add_row(row.name, *cells)
    return shown


def plot(rows: Sequence[Row], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    places = range(len(rows))
    axes.barh(
        [p - 0.2 for p in places], [r.plain for r in rows], 0.4, color="0.75", label="as it is"
    )
    axes.barh(
        [p + 0.2 for p in places], [r.scaled for r in rows], 0.4, color="0.25", label="scaled"
    )
    axes.set_yticks(places, [row.name for row in rows])
    axes.set(xlabel="held-out accuracy on all packages", title="sums of two LoRAs")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    finish(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the sums; return the exit status."""
    small = {"epochs": 2, "packages": 6, "most": 80, "length": 32, "batch_size": 16}
    parser = parser_of(__doc__, "merging.png", **small)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--density", type=float, default=0.5, help="what pruning keeps")
    parser.add_argument("--batches", type=int, default=4, help="batches of the distance")
    options = parser.parse_args(arguments)

    task = classify(options)
    packages = range(options.packages)
    loras = train(task, [packages[::2], packages[1::2]], options)
    rows = judge(task, loras, options)
    Console(width=max(100, Console().width)).print(table(rows, task.title))
    plot(rows, options.plot)
    print(f"accuracies: {options.plot.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
