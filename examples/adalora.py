"""AdaLoRA's loop: three seeds in lockstep, whose ranks move to the sites that need them.

    python examples/adalora.py
    python examples/adalora.py --target-r 2 --seeds 0,1,2,3

Each adapter starts with the same rank at every site. After each step the schedule scores all
singular triplets and sets E of the least important ones to zero, until the budget is left. The
schedule is a function of the step; the loop below is all there is to it. A table shows the ranks at
the sites, and a plot how the budget fell.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from probe import groups_of
from rich import box
from rich.console import Console
from rich.table import Table
from tasks import Task, accuracies, classify, in_epochs, numbers, parser_of
from tqdm import tqdm

import lora_func as lf
from lora_func.rules import adalora

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plots import finish


def train(task: Task, stacked: lf.Params, options: Namespace) -> list[list[int]]:
    """Train a stack in place; return how many triplets each member had after each step."""
    batches = in_epochs(task.data, options.epochs, options.seed)
    total = len(batches)
    schedule = adalora.Schedule(
        total=total, target_r=options.target_r, tinit=total // 10, tfinal=total // 3
    )
    optimizer = torch.optim.AdamW(groups_of(stacked, options.lr), weight_decay=0.0)
    trained, state, kept = lf.partition(stacked)[0], None, []
    for step, batch in enumerate(tqdm(batches, "AdaLoRA", unit="step")):
        optimizer.zero_grad()
        losses = lf.vcall(task.model, stacked, batch) + 0.1 * adalora.orthogonality(stacked)
        losses.sum().backward()
        grads = {key: leaf.grad for key, leaf in trained.items()}
        optimizer.step()
        masked, state = adalora.update(stacked, grads, state, step, schedule)
        with torch.no_grad():
            for key, leaf in trained.items():
                leaf.copy_(masked[key])
        kept.append(sum(ranks(stacked).values()).tolist())
    return kept


def ranks(stacked: lf.Params) -> dict[str, torch.Tensor]:
    """The number of triplets at each site, for each member."""
    ends = ".adalora.E"
    return {
        key.removesuffix(ends): leaf.count_nonzero(-1)
        for key, leaf in stacked.items()
        if key.endswith(ends)
    }


def table(stacked: lf.Params, seeds: Sequence[int], accuracy: Sequence[float], title: str) -> Table:
    shown = Table(title=title, box=box.SIMPLE)
    shown.add_column("site")
    for seed, value in zip(seeds, accuracy, strict=True):
        shown.add_column(f"seed {seed}, {value:.1%}", justify="right")
    for site, of_each in ranks(stacked).items():
        shown.add_row(site, *map(str, of_each.tolist()))
    return shown


def plot(stacked: lf.Params, kept: Sequence[Sequence[int]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    left.plot(kept, color="black")
    left.set(xlabel="step", ylabel="triplets of each adapter", title="the budget falls")
    found = ranks(stacked)
    shown = torch.stack([*found.values()]).double().mean(1).tolist()
    right.barh(range(len(found)), shown, color="0.4")
    right.set_yticks(range(len(found)), [".".join(site.split(".")[-4:]) for site in found])
    right.set(xlabel="rank, mean over the seeds", title="where the ranks went")
    finish(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the loop; return the exit status."""
    small = {"epochs": 2, "packages": 6, "most": 80, "length": 32, "batch_size": 16}
    parser = parser_of(__doc__, "adalora.png", **small)
    parser.add_argument("--r", type=int, default=8, help="the rank at the start")
    parser.add_argument("--target-r", type=int, default=3, help="the mean rank at the end")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seeds", type=numbers(int), default=[0, 1, 2])
    options = parser.parse_args(arguments)

    task = classify(options)
    cfg = [lf.AdaLoRA(r=options.r, layers=task.layers), task.head]
    members = lf.stack([lf.init(task.model, cfg, seed=seed) for seed in options.seeds])
    constants = lf.partition(members)[1]
    stacked = {k: v.detach().requires_grad_(k not in constants) for k, v in members.items()}
    kept = train(task, stacked, options)
    accuracy = accuracies(task, [stacked])
    shown = table(stacked, options.seeds, accuracy, task.title)
    Console(width=max(100, Console().width)).print(shown)
    plot(stacked, kept, options.plot)
    print(f"the budget and the ranks: {options.plot.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
