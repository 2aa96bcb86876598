"""MAML: meta-learn the start of an adapter through two inner gradient steps.

    python examples/maml.py

The tasks are sine waves; the frozen base has learnt their mean. A LoRA is meta-trained so that two
steps of gradient descent on ten points fit a new wave. The outer gradient passes through the inner
steps with exact second derivatives: ``grad`` of a function that calls ``grad(fcall)``, mapped over
the tasks of a batch with ``vmap``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from tasks import mean_of_sines, sines
from torch import Tensor, nn
from tqdm import tqdm

import lora_func as lf

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plots import MARKERS, finish, line


def loss_of(model: nn.Module, params: lf.Params, x: Tensor, y: Tensor) -> Tensor:
    return lf.fcall(model, params, x, loss_fn=lambda output, _: F.mse_loss(output, y))


def adapt(
    model: nn.Module, trained: lf.Params, constants: lf.Params, x: Tensor, y: Tensor, **inner
) -> lf.Params:
    """Take inner gradient steps; the result is a differentiable function of the initial leaves."""

    def loss(leaves: lf.Params) -> Tensor:
        return loss_of(model, {**leaves, **constants}, x, y)

    for _ in range(inner["steps"]):
        gradients = torch.func.grad(loss)(trained)
        trained = {key: leaf - inner["lr"] * gradients[key] for key, leaf in trained.items()}
    return trained


def after_adapting(
    model: nn.Module, trained: lf.Params, constants: lf.Params, tasks: tuple[Tensor, ...], **inner
) -> Tensor:
    """The loss on the second half of each task's points, after steps on the first, (tasks,)."""

    def of_task(x: Tensor, y: Tensor) -> Tensor:
        half = len(x) // 2
        adapted = adapt(model, trained, constants, x[:half], y[:half], **inner)
        return loss_of(model, {**adapted, **constants}, x[half:], y[half:])

    return torch.vmap(of_task)(*tasks[:2])


def meta_train(model: nn.Module, params: lf.Params, options) -> list[float]:
    trained, constants = lf.partition(params)
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-3, weight_decay=0.0)
    generator, curve = torch.Generator().manual_seed(options.seed), []
    with tqdm(range(options.steps), desc="meta-training", unit="step") as progress:
        for _ in progress:
            optimizer.zero_grad()
            tasks = sines(options.tasks, 20, generator)
            loss = after_adapting(model, trained, constants, tasks, steps=2, lr=options.lr).mean()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return curve


def by_steps(model: nn.Module, params: lf.Params, tasks: tuple[Tensor, ...], lr: float):
    """The mean loss on new tasks after 0 to 5 inner steps."""
    trained, constants = lf.partition({key: leaf.detach() for key, leaf in params.items()})
    return [
        after_adapting(model, trained, constants, tasks, steps=steps, lr=lr).mean().item()
        for steps in range(6)
    ]


def plot(model, starts: dict[str, lf.Params], results, curve, options) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    left.plot(curve, color="black")
    left.set(xlabel="meta-step", ylabel="loss after two inner steps", yscale="log")
    x, y, _ = (part[0] for part in sines(1, 20, torch.Generator().manual_seed(7)))
    grid = torch.linspace(-5, 5, 100)[:, None]
    right.scatter(x[:10], y[:10], color="black", label="ten points")
    for i, (name, params) in enumerate(starts.items()):
        look = line(i, len(starts))
        middle.plot(results[name], marker=MARKERS[i], label=name, **look)
        trained, constants = lf.partition({key: leaf.detach() for key, leaf in params.items()})
        fitted = adapt(model, trained, constants, x[:10], y[:10], steps=2, lr=options.lr)
        with torch.no_grad():
            right.plot(grid, lf.fcall(model, {**fitted, **constants}, grid), label=name, **look)
    middle.set(xlabel="inner steps", ylabel="loss on new tasks", yscale="log")
    right.set(title="a new wave, after two steps")
    middle.legend()
    right.legend()
    finish(figure, options.plot)


def main(arguments: Sequence[str] | None = None) -> int:
    """Meta-train and compare; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--tasks", type=int, default=25, help="tasks per meta-step")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate of the inner steps")
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("maml.png"))
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    model = mean_of_sines(options.base_steps, generator)
    cfg = [lf.LoRA(r=8, target_modules="2"), lf.Full(target_parameters=r"^[04]\.")]
    starts = {name: lf.init(model, cfg, seed=options.seed) for name in ("initial", "meta-learnt")}
    curve = meta_train(model, starts["meta-learnt"], options)
    new = sines(200, 20, generator)
    results = {name: by_steps(model, one, new, options.lr) for name, one in starts.items()}

    shown = Table(title="loss on 200 new waves, by inner steps", box=box.SIMPLE)
    for column in ("start", *map(str, range(6))):
        shown.add_column(column, justify="right")
    for name, losses in results.items():
        shown.add_row(name, *(f"{loss:.3f}" for loss in losses))
    Console(width=max(80, Console().width)).print(shown)
    plot(model, starts, results, curve, options)
    print(f"curves: {options.plot.resolve()}")
    return int(not results["meta-learnt"][2] < results["initial"][2])


if __name__ == "__main__":
    sys.exit(main())
