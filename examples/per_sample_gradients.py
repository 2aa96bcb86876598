"""Differentially private training (DP-SGD) of an adapter: clip the gradient of every text.

    python examples/per_sample_gradients.py
    python examples/per_sample_gradients.py --noise 1.0

``vmap(grad(fcall))`` gives the gradient of every text in one call. Each gradient is clipped to a
maximum norm. Gaussian noise is added to their sum, and a LoRA with its head takes the step. A run
without clipping and noise is the baseline. A privacy accountant (not included) would compute ε.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tasks import Batch, Task, accuracies, classify, in_epochs, parser_of
from torch import Tensor
from tqdm import tqdm

import lora_func as lf

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plots import finish, line


@dataclass
class Run:
    """One training run."""

    name: str
    losses: list[float] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    accuracy: float = 0.0


def per_sample(task: Task, trained: lf.Params, constants: lf.Params, batch: Batch):
    """Return the gradient of each text, leaf -> (texts, ...), and its loss."""

    def loss_of(leaves: lf.Params, row: Batch) -> Tensor:
        one = {key: tensor[None] for key, tensor in row.items()}
        return lf.fcall(task.model, {**leaves, **constants}, one)

    return torch.vmap(torch.func.grad_and_value(loss_of), in_dims=(None, 0))(trained, batch)


def clipped_sum(gradients: lf.Params, norms: Tensor, most: float) -> lf.Params:
    """Clip the gradient of each text to a maximum norm, and sum the gradients."""
    scale = (most / norms).clamp(max=1)
    return {key: torch.einsum("n,n...->...", scale, each) for key, each in gradients.items()}


def train(task: Task, name: str, options, *, private: bool) -> Run:
    run, generator = Run(name), torch.Generator().manual_seed(options.seed)
    cfg = [lf.LoRA(r=4, layers=task.layers), task.head]
    trained, constants = lf.partition(lf.init(task.model, cfg, seed=options.seed))
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3, weight_decay=0.0)
    batches = in_epochs(task.data, options.epochs, options.seed)
    with tqdm(batches, desc=name, unit="step") as progress:
        for batch in progress:
            point = {key: leaf.detach() for key, leaf in trained.items()}
            gradients, losses = per_sample(task, point, constants, batch)
            flat = torch.cat([each.flatten(1) for each in gradients.values()], 1)
            norms = flat.norm(dim=1)
            most = options.clip if private else torch.inf
            total = clipped_sum(gradients, norms, most)
            for key, leaf in trained.items():
                noise = torch.randn(leaf.shape, generator=generator) * options.noise * options.clip
                leaf.grad = (total[key] + (noise if private else 0)) / len(losses)
            optimizer.step()
            run.norms.append(norms)
            run.losses.append(losses.mean().item())
            progress.set_postfix(loss=f"{run.losses[-1]:.3f}")
    (run.accuracy,) = accuracies(task, [lf.stack([{**trained, **constants}])])
    return run


def table(runs: Sequence[Run], title: str) -> Table:
    shown = Table(title=title, box=box.SIMPLE)
    for column in ("run", "loss", "median norm of a text's gradient", "held-out accuracy"):
        shown.add_column(column, justify="left" if column == "run" else "right")
    for run in runs:
        norms = torch.cat(run.norms)
        shown.add_row(
            run.name,
            f"{run.losses[0]:.2f} → {run.losses[-1]:.2f}",
            f"{norms.median():.2f}",
            f"{run.accuracy:.1%}",
        )
    return shown


def plot(runs: Sequence[Run], clip: float, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, run in enumerate(runs):
        look = line(i, len(runs))
        left.plot(run.losses, label=f"{run.name}, {run.accuracy:.1%}", **look)
        right.hist(torch.cat(run.norms).tolist(), bins=40, histtype="step", label=run.name, **look)
    right.axvline(clip, color="black", linestyle=":", label="clipping norm")
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="norm of one text's gradient", ylabel="texts")
    left.legend()
    right.legend()
    finish(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both; return the exit status."""
    small = {"epochs": 1, "packages": 6, "most": 80, "length": 32, "batch_size": 16}
    parser = parser_of(__doc__, "per_sample.png", **small)
    parser.add_argument("--clip", type=float, default=1.0, help="maximum gradient norm of one text")
    parser.add_argument("--noise", type=float, default=0.5, help="noise std, relative to --clip")
    options = parser.parse_args(arguments)
    task = classify(options)
    runs = [
        train(task, "plain", options, private=False),
        train(task, f"clipped, noise {options.noise:g}", options, private=True),
    ]
    Console(width=max(90, Console().width)).print(table(runs, task.title))
    plot(runs, options.clip, options.plot)
    print(f"curves and norms: {options.plot.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
