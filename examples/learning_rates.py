"""The best learning rate of ten variants, and what the curvature at the start says of it.

    python examples/learning_rates.py
    python examples/learning_rates.py --variants lora,dora --rates 1e-3,1e-2 --seeds 0,1,2,3,4

First each variant is trained at all rates at once, one adapter for each rate in one vcall. Half of
the held-out text chooses its best rate. Then the variant is trained at that rate with each seed,
and the other half judges it: its accuracy, and the difference to the first variant, seed by seed,
with a 95 % interval. Variants are paired: a seed has the same head and batches for all.

A claim is tested on the way: the best rate of a method is low where the loss is sharp at the start.
The sharpness is the largest eigenvalue of the Hessian in the adapter's leaves, found by power
iteration, for all seeds at once. A table and a plot show what is seen.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import matplotlib
import torch
from probe import VARIANTS, add_variants, groups_of, make
from rich import box
from rich.console import Console
from rich.table import Table
from tasks import Task, accuracies, classify, in_epochs, interval, numbers, parser_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import lora_func as lf

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plots import finish, line

TEN = "lora,dora,pissa,milora,mica,delora,vera,ia3,oft,miss"
RATES = "3e-5,1e-4,3e-4,1e-3,3e-3,1e-2,3e-2,1e-1"


@dataclass
class Row:
    """What was found for one variant.

    Attributes:
        chosen: Accuracy at each rate, on the half of the held-out text that chooses.
        rate: The rate with the best of them.
        accuracies: Accuracy of each seed at that rate, on the other half.
        sharpness: The largest eigenvalue at the start, for each seed.
    """

    name: str
    chosen: list[float] = field(default_factory=list)
    rate: float = 0.0
    accuracies: list[float] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)


def train(
    task: Task, members: Sequence[lf.Params], rates: Sequence[float], options: Namespace, name: str
) -> None:
    """Train all members in place, in one call a step, each at its own rate."""
    groups = [g for one, rate in zip(members, rates, strict=True) for g in groups_of(one, rate)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for batch in tqdm(in_epochs(task.data, options.epochs, options.seed), name, unit="step"):
        optimizer.zero_grad()
        lf.vcall(task.model, lf.stack(members), batch).sum().backward()
        lf.clip_grad_norm(members, max_norm=1.0, model=task.model)
        optimizer.step()


def accuracy(task: Task, members: Sequence[lf.Params], half: int) -> list[float]:
    """The accuracy of each member on every second held-out batch."""
    return accuracies(replace(task, held_out=task.held_out[half::2]), [lf.stack(members)])


def sharpness(task: Task, members: Sequence[lf.Params], options: Namespace) -> list[float]:
    """The largest eigenvalue of the Hessian in the adapter's leaves, for each member at once.

    The losses of the members are independent, so that the Hessian of their sum has a block for each
    of them, and one product with it serves them all. Where one factor is zero the eigenvalues come
    in pairs of both signs: the first half of the iterations finds their size, and the second half
    iterates with the Hessian plus that size.
    """
    stacked = lf.stack(members)
    keys = [key for key in lf.partition(stacked)[0] if ".full." not in key]
    leaves = {key: stacked[key].detach().requires_grad_() for key in keys}
    batches = in_epochs(task.data, 1, options.seed)[: options.batches]

    def times(vectors: Sequence[Tensor]) -> list[Tensor]:
        total = [torch.zeros_like(vector) for vector in vectors]
        for batch in batches:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
                losses = lf.vcall(task.model, {**stacked, **leaves}, batch)
            gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), create_graph=True)
            along = sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True))
            products = torch.autograd.grad(along, list(leaves.values()), materialize_grads=True)
            total = [t + p / len(batches) for t, p in zip(total, products, strict=True)]
        return total

    def norms(vectors: Sequence[Tensor]) -> Tensor:
        return sum(v.square().reshape(len(v), -1).sum(1) for v in vectors).sqrt()

    def scaled(vectors: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
        return [v * factors.reshape(-1, *[1] * (v.ndim - 1)) for v in vectors]

    def unit(vectors: Sequence[Tensor]) -> list[Tensor]:
        return scaled(vectors, 1 / norms(vectors).clamp_min(1e-30))

    torch.manual_seed(options.seed)
    vectors = unit([torch.randn_like(leaf) for leaf in leaves.values()])
    shift = torch.zeros(len(members), dtype=vectors[0].dtype)
    for i in tqdm(range(options.iterations), "sharpness", unit="product", leave=False):
        products = times(vectors)
        if i < options.iterations // 2:  # the eigenvalue of the largest size may be negative
            shift, vectors = norms(products), unit(products)
            continue
        along = [v * p for v, p in zip(vectors, products, strict=True)]
        found = sum(each.reshape(len(each), -1).sum(1) for each in along)
        moved = zip(products, scaled(vectors, shift), strict=True)
        vectors = unit([p + v for p, v in moved])
    return found.tolist()


def study(task: Task, name: str, options: Namespace) -> Row:
    """Choose the rate of a variant, then try it with each seed."""
    row, entry = Row(name), VARIANTS[name]
    members = [make(task, entry, options.seed) for _ in options.rates]
    train(task, members, options.rates, options, f"{name}, rates")
    row.chosen = accuracy(task, members, half=0)
    row.rate = options.rates[max(range(len(row.chosen)), key=row.chosen.__getitem__)]
    members = [make(task, entry, seed) for seed in options.seeds]
    row.sharpness = sharpness(task, members, options)
    train(task, members, [row.rate] * len(members), options, f"{name}, seeds")
    row.accuracies = accuracy(task, members, half=1)
    return row


def correlation(rows: Sequence[Row]) -> float:
    """Pearson's correlation of log rate and log sharpness."""
    logs = torch.tensor([[row.rate, abs(mean(row.sharpness))] for row in rows]).log()
    return torch.corrcoef(logs.T)[0, 1].item()


def table(rows: Sequence[Row], title: str) -> Table:
    shown = Table(title=title, box=box.SIMPLE)
    first = rows[0]
    columns = ("variant", "best rate", "accuracy", f"minus {first.name}", "sharpness", "rate x it")
    for column in columns:
        shown.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        apart = [a - b for a, b in zip(row.accuracies, first.accuracies, strict=True)]
        difference = "" if row is first else f"{mean(apart):+.1%} ± {interval(apart):.1%}"
        sharp = mean(row.sharpness)
        cells = (f"{row.rate:g}", f"{mean(row.accuracies):.1%}", difference)
        shown.add_row(row.name, *cells, f"{sharp:.3g}", f"{row.rate * sharp:.3g}")
    return shown


def plot(rows: Sequence[Row], rates: Sequence[float], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for i, row in enumerate(rows):
        look = line(i, len(rows), marker=True)
        left.plot(rates, row.chosen, label=row.name, **look)
        look = look | {"ls": "", "ms": 9}
        right.plot(abs(mean(row.sharpness)), row.rate, label=row.name, **look)
    left.set(xscale="log", xlabel="learning rate", ylabel="accuracy", title="one vcall each")
    right.set(
        xscale="log",
        yscale="log",
        xlabel="largest eigenvalue of the Hessian at the start",
        ylabel="best learning rate",
        title=f"correlation of the logarithms: {correlation(rows):+.2f}",
    )
    right.legend(loc="upper left", bbox_to_anchor=(1, 1))
    finish(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; return the exit status."""
    small = {"epochs": 1, "packages": 6, "most": 60, "length": 24, "batch_size": 8}
    parser = parser_of(__doc__, "learning_rates.png", **small)
    add_variants(parser, TEN)
    parser.add_argument("--rates", type=numbers(float), default=numbers(float)(RATES))
    parser.add_argument("--seeds", type=numbers(int), default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=20, help="products with the Hessian")
    parser.add_argument("--batches", type=int, default=2, help="batches of the Hessian")
    options = parser.parse_args(arguments)

    task = classify(options)
    rows = [study(task, name, options) for name in options.variants]
    Console(width=max(100, Console().width)).print(table(rows, task.title))
    at_edge = [row.name for row in rows if row.rate in (options.rates[0], options.rates[-1])]
    if at_edge:
        print(f"the best rate is at the edge of the grid: {', '.join(at_edge)}")
    print(f"correlation of log rate and log sharpness: {correlation(rows):+.2f}")
    plot(rows, options.rates, options.plot)
    print(f"rates and sharpness: {options.plot.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
