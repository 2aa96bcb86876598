"""Train adapters on real text with a real model, and check that each one works.

    python -m nox -s probe                                    # two rows, minutes on a CPU
    python -m nox -s probe -- --variants all
    python -m nox -s probe -- --variants all --task generate

The text comes from the Python standard library. The model is a pretrained MiniLM, or for "generate"
a tiny Qwen3 that is trained first. Everything runs offline. Each row of the table is one adapter,
and all rows use the same base and data. The baseline "head" trains only a linear head on frozen
features. The exit status is 1 if any check fails.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import matplotlib
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tasks import TASKS, Batch, Task, in_epochs, parser_of, smoothed
from torch import Tensor, nn
from tqdm import tqdm

import lora_func as lf
from lora_func.variants import all_variants

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plots import finish, line


@dataclass(frozen=True)
class Entry:
    """A row to train: a variant with settings, or only the head.

    Attributes:
        config: The adapter's config class; None for only the head.
        trial: The variant's trial: settings, learning rate, calibration data, expected start.
    """

    config: type[lf.AdapterConfig] | None
    trial: lf.Trial

    def configs(self, task: Task) -> list[lf.AdapterConfig]:
        if self.config is None:
            return [task.head]
        adapter = self.config(layers=task.layers, **self.trial.settings)
        return [adapter, task.head] if task.with_head else [adapter]

    def data(self, task: Task) -> list[object] | None:
        """The calibration data that ``init`` takes."""
        if not self.trial.data:
            return None
        pairs = self.configs(task)[0].calibration == "pairs"
        return task.pairs[:8] if pairs else task.data[:8]


ID_ERR = {"exact": 0.0, "close": 1e-4, "elsewhere": float("inf")}
"""The largest change of a logit at the start, by the kind of start."""

VARIANTS = {"head": Entry(None, lf.Trial())} | {
    name: Entry(variant.config, trial)
    for variant in all_variants()
    for name, trial in variant.trials.items()
}


@dataclass
class Row:
    """The results in one row of the table."""

    name: str
    sites: int = 0
    trained: int = 0
    id_err: float = 0.0
    perturb: float = 0.0
    grad: float = 0.0
    moved: float = 0.0
    reload: float = 0.0
    before: float = 0.0
    after: float = 0.0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def first(self) -> float:
        return mean(self.losses[:10])

    @property
    def last(self) -> float:
        return mean(self.losses[-10:])

    def check(self, passed: bool, failure: str) -> None:
        if not passed:
            self.failures.append(failure)


def logits(model: nn.Module, params: lf.Params, batch: Batch) -> Tensor:
    with torch.no_grad():
        return lf.fcall(model, params, batch, loss_fn=lambda output, _: output.logits)


def accuracy(task: Task, params: lf.Params) -> float:
    hits = [task.hits(logits(task.model, params, batch), batch) for batch in task.held_out]
    return torch.cat(hits).double().mean().item()


def smallest_change(model: nn.Module, params: lf.Params, batch: Batch) -> float:
    """Perturb one trained leaf at a time, from a random point (at init some leaves have no effect).

    Returns the largest change of a logit for the leaf with the least effect; 0 means a dead leaf.
    """
    generator = torch.Generator().manual_seed(0)
    trained, _ = lf.partition(params)

    def moved(leaf: Tensor) -> Tensor:
        return leaf + 0.1 * torch.randn(leaf.shape, generator=generator)

    away = params | {key: moved(leaf) for key, leaf in trained.items()}
    reference = logits(model, away, batch)
    return min(
        (logits(model, away | {key: moved(away[key])}, batch) - reference).abs().max().item()
        for key in trained
    )


def reload_error(model: nn.Module, params: lf.Params, batch: Batch) -> float:
    """Save the dict, load it, and compare every leaf and the logits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        lf.save(params, path, model=model)
        loaded = lf.load(path, model=model)
    if loaded.keys() != params.keys():
        return float("inf")
    leaves = max((loaded[key] - leaf).abs().max().item() for key, leaf in params.items())
    return max(
        leaves, (logits(model, loaded, batch) - logits(model, params, batch)).abs().max().item()
    )


def expected_sites(task: Task, entry: Entry) -> set[str]:
    """The sites that a row should adapt, computed without the library."""
    head = task.head.target_parameters.strip("^\\.")
    if entry.config is None:
        return {head}
    blocks = max((m for m in task.model.modules() if isinstance(m, nn.ModuleList)), key=len)
    wanted = blocks if task.layers is None else [blocks[i] for i in task.layers]
    kinds = ("Linear", "Conv1D")
    linear = {id(m) for block in wanted for m in block.modules() if type(m).__name__ in kinds}
    sites = {name for name, module in task.model.named_modules() if id(module) in linear}
    return sites | ({head} if task.with_head else set())


def groups_of(params: lf.Params, lr: float) -> list[dict[str, object]]:
    """Parameter groups for the optimizer: the head with its own learning rate, and the rest."""
    trained, _ = lf.partition(params)
    head = [leaf for key, leaf in trained.items() if ".full." in key]
    rest = [leaf for key, leaf in trained.items() if ".full." not in key]
    return [{"params": leaves, "lr": r} for leaves, r in ((head, 1e-2), (rest, lr)) if leaves]


def train(task: Task, params: lf.Params, lr: float, epochs: int, seed: int, row: Row) -> None:
    """Train in place, and record losses and times."""
    trained, groups = lf.partition(params)[0], groups_of(params, lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in groups],
        total_steps=max(epochs * len(task.data), 2),
        pct_start=0.1,
    )
    with tqdm(in_epochs(task.data, epochs, seed), desc=row.name, unit="step") as progress:
        for batch in progress:
            start = time.perf_counter()
            loss = lf.fcall(task.model, params, batch)
            gradients = torch.autograd.grad(loss, [*trained.values()])
            for leaf, gradient in zip(trained.values(), gradients, strict=True):
                leaf.grad = gradient
            optimizer.step()
            schedule.step()
            row.seconds.append(time.perf_counter() - start)
            row.losses.append(loss.item())
            row.grad = row.grad or torch.stack([g.norm() for g in gradients]).norm().item()
            progress.set_postfix(loss=f"{loss.item():.3f}")


def make(task: Task, entry: Entry, seed: int) -> lf.Params:
    return lf.init(task.model, entry.configs(task), seed=seed, data=entry.data(task))


def probe(name: str, task: Task, epochs: int, seed: int) -> Row:
    """Train one row and run its checks."""
    row, entry, model = Row(name), VARIANTS[name], task.model
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    params = make(task, entry, seed)
    start = {key: leaf.detach().clone() for key, leaf in params.items()}
    trained, _ = lf.partition(params)
    sites = {key.rsplit(".", 2)[0] for key in params} - {"*"}
    row.sites, row.trained = len(sites), sum(leaf.numel() for leaf in trained.values())
    batch = task.data[0]
    with torch.no_grad():
        row.id_err = (logits(model, params, batch) - model(**batch).logits).abs().max().item()
    row.perturb = smallest_change(model, params, batch)
    row.before = accuracy(task, params)
    train(task, params, entry.trial.lr, epochs, seed, row)
    row.after = accuracy(task, params)
    row.moved = torch.stack([(trained[key] - start[key]).norm() for key in trained]).norm().item()
    row.reload = reload_error(model, params, batch)

    expected = expected_sites(task, entry)
    still = [key for key in trained if torch.equal(params[key], start[key])]
    changed = [
        key for key, tensor in model.state_dict().items() if not torch.equal(tensor, base[key])
    ]
    if entry.trial.drops_sites:
        row.check(sites <= expected, f"targets differ: {sites - expected}")
    else:
        row.check(sites == expected, f"targets differ: {sites ^ expected}")
    row.check(row.id_err <= ID_ERR[entry.trial.start], "the start is not the base model")
    row.check(row.perturb > 0, "a leaf has no effect on the output")
    row.check(not still, f"leaves that never moved: {still}")
    row.check(not changed, f"base tensors that changed: {changed}")
    row.check(all(p.grad is None for p in model.parameters()), "the base got a gradient")
    row.check(row.reload == 0, "reloading changed the adapter")
    row.check(row.last < row.first, "the loss did not fall")
    return row


COLUMNS: dict[str, Callable[[Row], str]] = {
    "variant": lambda row: row.name,
    "sites": lambda row: str(row.sites),
    "trained": lambda row: f"{row.trained:,}",
    "id_err": lambda row: f"{row.id_err:.1g}",
    "perturb": lambda row: f"{row.perturb:.1g}",
    "loss": lambda row: f"{row.first:.2f} → {row.last:.2f}",
    "drop": lambda row: f"{1 - row.last / row.first:.0%}",
    "|grad|": lambda row: f"{row.grad:.2f}",
    "‖Δθ‖": lambda row: f"{row.moved:.2f}",
    "reload": lambda row: f"{row.reload:.1g}",
    "accuracy": lambda row: f"{row.before:.1%} → {row.after:.1%}",
    "ms/step": lambda row: f"{1000 * median(row.seconds):.0f}",
    "checks": lambda row: "[red]failed[/red]" if row.failures else "[green]passed[/green]",
}


def table(rows: Sequence[Row], title: str) -> Table:
    caption = "id_err, perturb, reload: largest change of a logit; loss: mean of ten steps"
    shown = Table(title=title, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        shown.add_row(*(show(row) for show in COLUMNS.values()))
    return shown


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    columns = 1 + len(rows) // 24
    figure, axes = plt.subplots(figsize=(7 + 2 * columns, 6), layout="constrained")
    for i, row in enumerate(rows):
        label = f"{row.name}, {row.after:.1%}"
        axes.plot(smoothed(row.losses), label=label, **line(i, len(rows)))
    axes.set(
        xlabel="step",
        ylabel="training loss (mean of ten steps)",
        title=f"{title} Legend: held-out accuracy",
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), ncols=columns, fontsize=8)
    finish(figure, path)


def add_variants(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--variants``, a list of names."""

    def names(text: str) -> list[str]:
        given = list(VARIANTS) if text == "all" else text.split(",")
        if unknown := set(given) - set(VARIANTS):
            there = f"there are {', '.join(VARIANTS)}"
            raise argparse.ArgumentTypeError(f"no variants {sorted(unknown)}; {there}")
        return given

    known = f"comma-separated list from {', '.join(VARIANTS)}; or all"
    parser.add_argument("--variants", type=names, default=default, help=known)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the probe; return the exit status."""
    parser = parser_of(__doc__, "probe.png")
    add_variants(parser, "head,lora")
    parser.add_argument("--task", choices=TASKS, default="classify")
    options = parser.parse_args(arguments)

    task = TASKS[options.task](options)
    results = [probe(name, task, options.epochs, options.seed) for name in options.variants]
    wide = Console(width=max(130, Console().width))
    wide.print(table(results, task.title))
    plot(results, task.question, options.plot)
    print(f"loss curves: {options.plot.resolve()}")
    for row in results:
        for failure in row.failures:
            print(f"{row.name}: {failure}", file=sys.stderr)
    return int(any(row.failures for row in results))


if __name__ == "__main__":
    sys.exit(main())
