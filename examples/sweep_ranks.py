"""A grid of adapters over ranks, which can be killed and goes on with another number of ranks.

    torchrun --standalone --nproc-per-node 2 examples/sweep_ranks.py --stop-after 20
    python examples/sweep_ranks.py        # a single rank goes on where the two stopped

Each rank has the frozen model and trains its share of the members in one ``vcall`` for each step,
so nothing has to be sent. Each member has a file of its own with its adapter, optimizer and losses,
from which whatever rank has it next goes on. At the end rank 0 gets all members.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean

import matplotlib
import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from tasks import Task, accuracies, classify, in_epochs, parser_of
from tqdm import tqdm

import lora_func as lf
from lora_func.distributed import gathered, share

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plots import finish


@dataclass
class Member:
    """One adapter of the grid, with its own optimizer and file."""

    lr: float
    seed: int
    file: Path
    params: lf.Params = field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None
    losses: list[float] = field(default_factory=list)

    def start(self, task: Task) -> None:
        """Go on from the file, or begin."""
        state = lf.load_training_state(self.file, model=task.model) if self.file.exists() else None
        lora = lf.LoRA(r=8, layers=task.layers)
        fresh = lf.init(task.model, [lora, task.head], seed=self.seed)
        self.params = fresh if state is None else state.params
        leaves = lf.partition(self.params)[0].values()
        self.optimizer = torch.optim.AdamW(leaves, lr=self.lr)
        if state is not None:
            self.optimizer.load_state_dict(state.optimizer)
            self.losses = state.extra["losses"]

    def save(self, task: Task) -> None:
        extra = {"losses": self.losses}
        settings = {"step": len(self.losses), "model": task.model, "extra": extra}
        lf.save_training_state(self.params, self.optimizer, self.file, **settings)


def grid_parser(description: str, name: str) -> argparse.ArgumentParser:
    small = {"epochs": 1, "packages": 6, "most": 80, "length": 40, "batch_size": 16}
    parser = parser_of(description, f"{name}.png", **small)
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(name), help="where members are kept")
    parser.add_argument("--keep", type=int, default=10, help="steps between two saved states")
    return parser


def grid(options) -> list[Member]:
    options.folder.mkdir(parents=True, exist_ok=True)
    settings = enumerate(product(options.lrs, range(options.seeds)))
    return [Member(*own, options.folder / f"member-{i}.safetensors") for i, own in settings]


def train(task: Task, members: Sequence[Member], options, *, quiet: bool = False) -> None:
    """Train the members of this rank, and keep their state every few steps and at the end."""
    batches = in_epochs(task.data, options.epochs, options.seed)[: options.stop_after]
    for step, batch in enumerate(tqdm(batches, unit="step", disable=quiet)):
        behind = [member for member in members if len(member.losses) <= step]
        if not behind:
            continue
        for member in behind:
            member.optimizer.zero_grad()
        losses = lf.vcall(task.model, [member.params for member in behind], batch)
        losses.sum().backward()
        for member, loss in zip(behind, losses.tolist(), strict=True):
            member.optimizer.step()
            member.losses.append(loss)
            if step % options.keep == 0 or step == len(batches) - 1:
                member.save(task)


def report(task: Task, members: Sequence[Member], options) -> None:
    stacks = [lf.stack([member.params for member in members])]
    shown = Table(title=task.title, box=box.SIMPLE)
    for column in ("lr", "seed", "held-out accuracy"):
        shown.add_column(column, justify="right")
    found = accuracies(task, stacks, chunk=8)
    for member, accuracy in zip(members, found, strict=True):
        shown.add_row(f"{member.lr:g}", str(member.seed), f"{accuracy:.1%}")
    Console(width=max(90, Console().width)).print(shown)
    pairs = [*zip(members, found, strict=True)]
    by_rate = {lr: [accuracy for m, accuracy in pairs if m.lr == lr] for lr in options.lrs}
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([*by_rate], [mean(own) for own in by_rate.values()], "k-")
    for lr, own in by_rate.items():
        axes.plot([lr] * len(own), own, "o", color="0.4")
    axes.set(xscale="log", xlabel="learning rate", ylabel="held-out accuracy", title=task.question)
    finish(figure, options.plot)
    print(f"accuracies: {options.plot.resolve()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the grid; return the exit status."""
    parser = grid_parser(__doc__, "sweep_ranks")
    parser.add_argument("--stop-after", type=int, help="stop at this step, as if killed")
    options = parser.parse_args(arguments)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    task = classify(options)
    task.model.requires_grad_(False)
    everyone = grid(options)
    mine = [member for _, member in share(everyone)]
    for member in mine:
        member.start(task)
    train(task, mine, options, quiet=dist.get_rank() > 0)
    adapters = gathered([member.params for member in mine])
    if dist.get_rank() == 0 and options.stop_after is None:
        for member, params in zip(everyone, adapters, strict=True):
            member.params = params
        report(task, everyone, options)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
