"""Adapters on a frozen 4-bit base: one adapter, then a sweep of eight in one step.

    python examples/qlora.py
    python examples/qlora.py --bits 8
    python examples/qlora.py --model answerdotai/ModernBERT-base --rank 16

transformers and bitsandbytes load the base as for QLoRA; its packed weights stay unchanged. A LoRA
and a linear head are trained on the dense model (the baseline), then on the quantised model, from
the usual start and with 4 bits from LoftQ's, then with four learning rates and two seeds at once.
The task: which package of the standard library does a docstring document?
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean

import matplotlib
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tasks import Classifier, Task, accuracies, classify, in_epochs, load, parser_of, smoothed
from torch import Tensor
from tqdm import tqdm
from transformers import BitsAndBytesConfig

import lora_func as lf

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plots import finish, line


@dataclass
class Run:
    """One trained adapter: its base, settings, loss curve and accuracy."""

    base: str
    lr: float
    seed: int
    losses: list[float]
    accuracy: float


def quantisation(bits: int) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )


def on_device(task: Task, device: str) -> Task:
    task.model.to(device)
    data, held_out = (
        [{name: tensor.to(device) for name, tensor in batch.items()} for batch in side]
        for side in (task.data, task.held_out)
    )
    return replace(task, data=data, held_out=held_out)


def quantised(task: Task, options: argparse.Namespace) -> Task:
    """The same task with the encoder quantised at load time and the same head."""
    settings = {"device_map": options.device, "quantization_config": quantisation(options.bits)}
    encoder, _ = load(options.model, **settings)
    model = Classifier(encoder, task.model.head.out_features).eval()
    model.head = task.model.head
    return replace(task, model=model)


def lora_of(task: Task, options: argparse.Namespace) -> lf.LoRA:
    return lf.LoRA(r=options.rank, alpha=2.0 * options.rank, layers=task.layers)


def train(
    name: str,
    task: Task,
    settings: Sequence[tuple[float, int]],
    losses_of: Callable[[list[lf.Params], dict[str, Tensor]], Tensor],
    options: argparse.Namespace,
    start: lf.Params | None = None,
) -> list[Run]:
    """Train one adapter per (learning rate, seed) pair, with one optimizer."""
    cfg = [lora_of(task, options), task.head]
    adapters = [lf.init(task.model, cfg, seed=seed) | (start or {}) for _, seed in settings]
    optimizer = torch.optim.AdamW(
        {"params": [*lf.partition(params)[0].values()], "lr": lr}
        for params, (lr, _) in zip(adapters, settings, strict=True)
    )
    curves = []
    with tqdm(in_epochs(task.data, options.epochs, options.seed), name, unit="step") as progress:
        for batch in progress:
            optimizer.zero_grad()
            losses = losses_of(adapters, batch)
            losses.sum().backward()
            optimizer.step()
            curves.append(losses.tolist())
            progress.set_postfix(adapters=len(adapters), best=f"{losses.min().item():.3f}")
    scores = accuracies(task, [lf.stack(adapters)])
    found = zip(settings, zip(*curves, strict=True), scores, strict=True)
    return [Run(name, *setting, list(losses), accuracy) for setting, losses, accuracy in found]


def mebibytes(model: torch.nn.Module) -> float:
    """The size of the parameters in MiB."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


def table(runs: Sequence[Run], title: str) -> Table:
    shown = Table(title=title, box=box.SIMPLE)
    for column in ("base", "lr", "seed", "loss", "held-out accuracy"):
        shown.add_column(column, justify="left" if column == "base" else "right")
    for run in runs:
        loss = f"{mean(run.losses[:10]):.2f} → {mean(run.losses[-10:]):.2f}"
        shown.add_row(run.base, f"{run.lr:g}", str(run.seed), loss, f"{run.accuracy:.1%}")
    return shown


def plot(runs: Sequence[Run], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for i, run in enumerate(runs):
        label = f"{run.base}, lr {run.lr:g}, seed {run.seed}: {run.accuracy:.1%}"
        axes.plot(smoothed(run.losses), label=label, **line(i, len(runs)))
    axes.set(xlabel="step", ylabel="training loss (mean of ten steps)", title="A quantised base")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    finish(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train on both bases, then run the sweep; return the exit status."""
    small = {"epochs": 1, "packages": 6, "most": 80, "length": 40, "batch_size": 16}
    parser = parser_of(__doc__, "qlora.png", **small)
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args(arguments)

    dense = on_device(classify(options), options.device)
    packed = quantised(dense, options)

    def alone(task: Task) -> Callable[[list[lf.Params], dict[str, Tensor]], Tensor]:
        return lambda adapters, batch: lf.fcall(task.model, adapters[0], batch)[None]

    def together(adapters: list[lf.Params], batch: dict[str, Tensor]) -> Tensor:
        return lf.vcall(packed.model, lf.stack(adapters), batch)

    one, name = [(options.lr, options.seed)], f"{options.bits} bits"
    grid = [(options.lr * factor, seed) for factor, seed in product((0.1, 0.3, 1.0, 3.0), (1, 2))]
    runs = train("dense", dense, one, alone(dense), options)
    runs += train(name, packed, one, alone(packed), options)
    if options.bits == 4:
        _, start = lf.loftq(dense.model, lora_of(dense, options))
        runs += train(f"{name}, LoftQ", packed, one, alone(packed), options, start)
    runs += train(f"{name}, sweep", packed, grid, together, options)
    sizes = f"{mebibytes(dense.model):.1f} MiB, with {name} {mebibytes(packed.model):.1f}"
    title = f"{dense.title}: {sizes}"
    Console(width=max(100, Console().width)).print(table(runs, title))
    plot(runs, options.plot)
    print(f"loss curves: {options.plot.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
