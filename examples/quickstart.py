"""A first look: a head against LoRAs, three seeds and two ranks of them, in one step on one base.

    python -m nox -s quickstart                        # minutes on a CPU, offline
    python -m nox -s quickstart -- --ranks 2,8,32 --seeds 0,1,2,3

Nine adapters train together on a frozen, pretrained MiniLM: a linear head alone with three seeds,
and a LoRA beside a head with two ranks and three seeds. The task: which package of Python's
standard library does a docstring document? Each step calls the base once for all of them, and each
adapter is what it would be alone. A table, a sentence and a plot say what was found. The exit
status is 1 if the base changed, or a saved adapter does not come back exactly.
"""

import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import matplotlib
import torch
from probe import groups_of
from rich import box
from rich.console import Console
from rich.table import Table
from tasks import Task, accuracies, classify, in_epochs, interval, numbers, parser_of
from tqdm import tqdm

import lora_func as lf

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plots import finish, line

COLUMNS = """
  trained     numbers that one adapter trains; the base has {base:,}, and none of them changes
  at step n   share of held-out docstrings whose package is named, mean of the seeds
  end         the same at the end, with its 95 % interval over the seeds
  to head     the difference to the head, seed by seed, with its 95 % interval

A seed draws the LoRA's A. Heads start alike and see the same batches, so that heads alone are
equal. The intervals say how much seeds matter; other texts would move all accuracies together.
"""

NEXT = """
What to do next:
  another grid          python -m nox -s quickstart -- --ranks 2,8,32 --seeds 0,1,2,3
  every variant         python -m nox -s probe -- --variants all
  in your own project   README.md, "Fifteen lines"; docs/start.md
"""


@dataclass
class Kind:
    """Adapters that differ in their seed alone.

    Attributes:
        name: What they are.
        members: One adapter for each seed.
        accuracies: Held-out accuracy of each of them, at each look.
    """

    name: str
    members: list[lf.Params]
    accuracies: list[list[float]] = field(default_factory=list)

    @property
    def trained(self) -> int:
        return sum(leaf.numel() for leaf in lf.partition(self.members[0])[0].values())


def kinds_of(task: Task, options: Namespace) -> list[Kind]:
    configs = {"head alone": [task.head]}
    for rank in options.ranks:
        configs[f"LoRA, rank {rank}"] = [lf.LoRA(r=rank, layers=task.layers), task.head]
    return [
        Kind(name, [lf.init(task.model, cfg, seed=seed) for seed in options.seeds])
        for name, cfg in configs.items()
    ]


def train(task: Task, kinds: Sequence[Kind], options: Namespace) -> list[int]:
    """Train all adapters in place; return the steps at which they were judged."""
    members = [member for kind in kinds for member in kind.members]
    groups = [group for member in members for group in groups_of(member, options.lr)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    batches, looks = in_epochs(task.data, options.epochs, options.seed), []
    with tqdm(batches, f"{len(members)} adapters", unit="step") as bar:
        for step, batch in enumerate(bar):
            if step % max(len(batches) // 4, 1) == 0:
                judge(task, kinds)
                looks.append(step)
            optimizer.zero_grad()
            stacks = [lf.stack(kind.members) for kind in kinds]
            losses = lf.vcall(task.model, stacks, batch)
            losses.sum().backward()
            optimizer.step()
            bar.set_postfix(loss=f"{losses.mean().item():.2f}")
    judge(task, kinds)
    return [*looks, len(batches)]


def judge(task: Task, kinds: Sequence[Kind]) -> None:
    found = iter(accuracies(task, [lf.stack(kind.members) for kind in kinds]))
    for kind in kinds:
        kind.accuracies.append([next(found) for _ in kind.members])


def difference(kind: Kind, head: Kind) -> list[float]:
    return [a - b for a, b in zip(kind.accuracies[-1], head.accuracies[-1], strict=True)]


def table(kinds: Sequence[Kind], looks: Sequence[int], title: str) -> Table:
    shown = Table(title=title, box=box.SIMPLE)
    columns = ("adapter", "trained", *(f"at step {n}" for n in looks[:-1]), "end", "to head")
    for column in columns:
        shown.add_column(column, justify="left" if column == "adapter" else "right")
    for kind in kinds:
        cells = [f"{mean(each):.1%}" for each in kind.accuracies[:-1]]
        end = f"{mean(kind.accuracies[-1]):.1%} ± {interval(kind.accuracies[-1]):.1%}"
        apart = difference(kind, kinds[0])
        to_head = "" if kind is kinds[0] else f"{mean(apart):+.1%} ± {interval(apart):.1%}"
        shown.add_row(kind.name, f"{kind.trained:,}", *cells, end, to_head)
    return shown


def sentence(kinds: Sequence[Kind], is_unchanged: bool) -> str:
    """What was found, in words."""
    best = max(kinds[1:], key=lambda kind: mean(kind.accuracies[-1]))
    apart = difference(best, kinds[0])
    size, doubt = 100 * mean(apart), 100 * interval(apart)
    word = "beats" if size > 0 else "is behind"
    sure = "" if abs(size) > doubt else ", which more seeds would have to confirm"
    base = "the base did not change by a bit" if is_unchanged else "THE BASE CHANGED"
    return (
        f"{best.name} {word} the head by {abs(size):.1f} points ± {doubt:.1f}{sure}; all "
        f"{sum(len(kind.members) for kind in kinds)} adapters trained in one call a step; {base}."
    )


def comes_back(task: Task, params: lf.Params) -> bool:
    """True if an adapter is the same after it was saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        lf.save(params, path, model=task.model)
        again = lf.load(path, model=task.model)
    return all(torch.equal(again[key], leaf) for key, leaf in params.items())


def plot(kinds: Sequence[Kind], looks: Sequence[int], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, kind in enumerate(kinds):
        look = line(i, len(kinds), marker=True)
        for each in zip(*kind.accuracies, strict=True):
            axes.plot(looks, each, color=look["color"], alpha=0.25, lw=1)
        shown = [mean(each) for each in kind.accuracies]
        axes.plot(looks, shown, label=kind.name, **look)
    axes.set(xlabel="step", ylabel="held-out accuracy", title="thick: mean of the seeds")
    axes.legend()
    finish(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit status."""
    small = {"epochs": 1, "packages": 8, "most": 100, "length": 40, "batch_size": 16}
    parser = parser_of(__doc__, "quickstart.png", **small)
    parser.add_argument("--ranks", type=numbers(int), default=[4, 16])
    parser.add_argument("--seeds", type=numbers(int), default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=2e-3, help="of the LoRAs; the head has 1e-2")
    options = parser.parse_args(arguments)

    task = classify(options)
    before = {key: tensor.clone() for key, tensor in task.model.state_dict().items()}
    kinds = kinds_of(task, options)
    looks = train(task, kinds, options)
    after = task.model.state_dict()
    is_unchanged = all(torch.equal(after[key], tensor) for key, tensor in before.items())
    returned = comes_back(task, kinds[-1].members[0])

    Console(width=max(110, Console().width)).print(table(kinds, looks, task.title))
    print(COLUMNS.format(base=sum(tensor.numel() for tensor in before.values())))
    print(sentence(kinds, is_unchanged))
    print("A saved adapter came back exactly." if returned else "A SAVED ADAPTER CHANGED.")
    plot(kinds, looks, options.plot)
    print(f"Held-out accuracy at every look: {options.plot.resolve()}")
    print(NEXT)
    return 0 if is_unchanged and returned else 1


if __name__ == "__main__":
    sys.exit(main())
