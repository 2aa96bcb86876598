"""Rules of training side by side: one LoRA, one start, one batch; eight ways to take the step.

    python examples/rules.py
    python examples/rules.py --lr 3e-3 --ratio 8

All members stand in one sweep: the frozen MiniLM runs once for all of them. AdamW follows the rules
that change gradients (LoRA-FA, Riemannian, LoRA-Pro) and LoRA+, whose B learns faster; balanced
factors are written after AdamW's step; LoRA-Muon and LoRA-RITE take steps of their own. A table and
a plot compare them.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib
import torch
from probe import groups_of
from rich import box
from rich.console import Console
from rich.table import Table
from tasks import Task, accuracies, classify, in_epochs, parser_of, smoothed
from tqdm import tqdm

import lora_func as lf
from lora_func import rules

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plots import finish, line

GRADIENT_RULES = {
    "LoRA-FA": rules.lora_fa,
    "Riemannian": partial(rules.riemannian, rho=1e-6, relative=True),
    "LoRA-Pro": rules.lora_pro,
}
STEPS = {"LoRA-Muon": (rules.lora_muon, 30.0), "LoRA-RITE": (rules.lora_rite, 1.0)}
"""Rules with steps of their own, and how much larger than AdamW's their learning rate is."""

NAMES = ("AdamW", "LoRA+", *GRADIENT_RULES, "balanced", *STEPS)


class Trainer:
    """The members by name, and what takes their steps."""

    def __init__(self, members: dict[str, lf.Params], options: Namespace) -> None:
        self.members, self.lr = members, options.lr
        self.states: dict[str, lf.Params | None] = dict.fromkeys(STEPS)
        groups = []
        for name, member in members.items():
            head = {key: leaf for key, leaf in member.items() if ".full." in key}
            if name == "LoRA+":
                groups += groups_of(head, self.lr)
                rest = {key: leaf for key, leaf in member.items() if key not in head}
                groups += rules.groups(rest, rules.lora_plus(rest, self.lr, options.ratio))
            else:
                groups += groups_of(head if name in STEPS else member, self.lr)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def step(self) -> None:
        """Take a step of every member from the gradients at its leaves."""
        for name, rule in GRADIENT_RULES.items():
            member = self.members[name]
            rules.assign(member, rule(member, rules.gradients(member)))
        stepped = {name: self._own_step(name) for name in STEPS}
        self.optimizer.step()
        stepped["balanced"] = rules.balance(self.members["balanced"])
        with torch.no_grad():
            for name, new in stepped.items():
                for key, leaf in self.members[name].items():
                    if ".full." not in key:
                        leaf.copy_(new[key])

    def _own_step(self, name: str) -> lf.Params:
        rule, factor = STEPS[name]
        member = self.members[name]
        moved, self.states[name] = rule(
            member, rules.gradients(member), self.states[name], lr=factor * self.lr
        )
        return moved


def train(task: Task, members: dict[str, lf.Params], options: Namespace) -> torch.Tensor:
    """Train all members in place; return their losses, (steps, members)."""
    trainer, curves = Trainer(members, options), []
    with tqdm(in_epochs(task.data, options.epochs, options.seed), "rules", unit="step") as bar:
        for batch in bar:
            trainer.optimizer.zero_grad()
            for member in members.values():
                rules.assign(member, {})
            losses = lf.vcall(task.model, lf.stack([*members.values()]), batch)
            losses.sum().backward()
            trainer.step()
            curves.append(losses.detach())
            bar.set_postfix(first=[*members][losses.argmin()], loss=f"{losses.min().item():.3f}")
    return torch.stack(curves)


def table(names: Sequence[str], curves: torch.Tensor, accuracy: torch.Tensor, title: str) -> Table:
    shown = Table(title=title, box=box.SIMPLE)
    for column in ("rule", "loss, first ten", "loss, last ten", "held-out accuracy"):
        shown.add_column(column, justify="left" if column == "rule" else "right")
    for k in accuracy.argsort(descending=True).tolist():
        first, last = curves[:10, k].mean(), curves[-10:, k].mean()
        shown.add_row(names[k], f"{first:.3f}", f"{last:.3f}", f"{accuracy[k]:.1%}")
    return shown


def plot(names: Sequence[str], curves: torch.Tensor, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for k, name in enumerate(names):
        axes.plot(smoothed(curves[:, k].tolist()), label=name, **line(k, len(names)))
    axes.set(xlabel="step", ylabel="training loss (mean of ten steps)", title="one start, one data")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    finish(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the rules; return the exit status."""
    small = {"epochs": 1, "packages": 6, "most": 80, "length": 32, "batch_size": 16}
    parser = parser_of(__doc__, "rules.png", **small)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ratio", type=float, default=16.0, help="of LoRA+")
    options = parser.parse_args(arguments)

    task = classify(options)
    cfg = [lf.LoRA(r=8, layers=task.layers), task.head]
    members = {name: lf.init(task.model, cfg, seed=options.seed) for name in NAMES}
    curves = train(task, members, options)
    accuracy = torch.tensor(accuracies(task, [lf.stack([*members.values()])]))
    Console(width=max(100, Console().width)).print(table(NAMES, curves, accuracy, task.title))
    plot(NAMES, curves, options.plot)
    print(f"loss curves: {options.plot.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
