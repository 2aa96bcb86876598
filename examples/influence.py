"""Influence functions on an adapter: which training texts hurt held-out text?

    python examples/influence.py

Some labels are wrong. A LoRA with a head is trained on all texts. The influence of a training text
on the held-out loss is gᵢᵀ (H + λ)⁻¹ g, over the adapter's parameters only. ``vmap(grad)`` gives
the gradients, ``jvp(grad)`` the Hessian-vector products, and conjugate gradients the inverse. Texts
with wrong labels should have the most harmful influence.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tasks import Batch, Task, classify, in_epochs, parser_of
from torch import Tensor
from tqdm import tqdm

import lora_func as lf

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plots import finish


def flip(task: Task, share: float, classes: int, seed: int) -> list[Tensor]:
    """Give a share of the training texts a wrong label; return a mask per batch."""
    generator, wrong = torch.Generator().manual_seed(seed), []
    for batch in task.data:
        labels = batch["labels"]
        flipped = torch.rand(len(labels), generator=generator) < share
        other = torch.randint(1, classes, (len(labels),), generator=generator)
        batch["labels"] = torch.where(flipped, (labels + other) % classes, labels)
        wrong.append(flipped)
    return wrong


def train(task: Task, params: lf.Params, epochs: int, seed: int) -> None:
    trained, _ = lf.partition(params)
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3, weight_decay=0.0)
    with tqdm(in_epochs(task.data, epochs, seed), desc="train", unit="step") as progress:
        for batch in progress:
            optimizer.zero_grad()
            loss = lf.fcall(task.model, params, batch)
            loss.backward()
            optimizer.step()
            progress.set_postfix(loss=f"{loss.item():.3f}")


class Adapter:
    """The losses of a trained adapter as functions of its flattened parameters."""

    def __init__(self, task: Task, params: lf.Params) -> None:
        trained, self.constants = lf.partition(params)
        self.task = task
        self.shapes = {key: leaf.shape for key, leaf in trained.items()}
        self.vector = torch.cat([leaf.detach().flatten() for leaf in trained.values()])

    def loss(self, vector: Tensor, batch: Batch) -> Tensor:
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        leaves = {
            key: part.view(shape)
            for (key, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
        return lf.fcall(self.task.model, {**leaves, **self.constants}, batch)

    def gradient(self, batches: Sequence[Batch]) -> Tensor:
        gradient = torch.func.grad(self.loss)
        return torch.stack([gradient(self.vector, batch) for batch in batches]).mean(0)

    def per_text(self, batch: Batch) -> Tensor:
        """The gradient of each text, (texts, parameters)."""

        def one(row: Batch) -> Tensor:
            single = {key: tensor[None] for key, tensor in row.items()}
            return torch.func.grad(self.loss)(self.vector, single)

        return torch.vmap(one)(batch)

    def hessian_times(self, direction: Tensor, batches: Sequence[Batch]) -> Tensor:
        products = []
        for batch in batches:
            gradient = torch.func.grad(lambda vector, batch=batch: self.loss(vector, batch))
            products.append(torch.func.jvp(gradient, (self.vector,), (direction,))[1])
        return torch.stack(products).mean(0)


def conjugate_gradients(times: Callable[[Tensor], Tensor], goal: Tensor, steps: int) -> Tensor:
    """Solve ``times(x) = goal`` for a symmetric map; stop at non-positive curvature."""
    x, residual = torch.zeros_like(goal), goal.clone()
    direction = residual.clone()
    for _ in tqdm(range(steps), desc="inverse Hessian", unit="product"):
        image = times(direction)
        curvature = direction @ image
        if curvature <= 0:
            break
        step = residual @ residual / curvature
        x, before = x + step * direction, residual @ residual
        residual = residual - step * image
        direction = residual + (residual @ residual / before) * direction
    return x


def rank_statistic(scores: Tensor, wrong: Tensor) -> float:
    """The ROC AUC: the probability that a wrong label scores above a right one."""
    above = scores[wrong][:, None] > scores[~wrong][None]
    return above.double().mean().item()


def plot(influence: Tensor, wrong: Tensor, title: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    low, high = influence.quantile(0.02).item(), influence.quantile(0.98).item()
    for label, some, look in (
        ("right labels", ~wrong, {"color": "0.75"}),
        ("wrong labels", wrong, {"color": "black", "histtype": "step", "lw": 1.5}),
    ):
        values = influence[some].clamp(low, high).tolist()
        axes.hist(values, bins=40, range=(low, high), density=True, label=label, **look)
    axes.set(xlabel="influence on the held-out loss (positive: it hurts)", title=title)
    axes.legend()
    finish(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and compute influences; return the exit status."""
    small = {"epochs": 2, "packages": 4, "most": 60, "length": 32, "batch_size": 16}
    parser = parser_of(__doc__, "influence.png", **small)
    parser.add_argument("--wrong", type=float, default=0.15, help="share of wrong labels")
    parser.add_argument("--damping", type=float, default=0.05, help="damping λ of the Hessian")
    parser.add_argument("--products", type=int, default=8, help="maximum Hessian-vector products")
    options = parser.parse_args(arguments)

    task = classify(options)
    wrong = torch.cat(flip(task, options.wrong, options.packages, options.seed))
    cfg = [lf.LoRA(r=2, layers=task.layers[-1:]), task.head]
    params = lf.init(task.model, cfg, seed=options.seed)
    train(task, params, options.epochs, options.seed)

    adapter = Adapter(task, params)
    some = task.data[:: max(len(task.data) // 4, 1)]

    def times(direction: Tensor) -> Tensor:
        return adapter.hessian_times(direction, some) + options.damping * direction

    solved = conjugate_gradients(times, adapter.gradient(task.held_out), options.products)
    influence = torch.cat(
        [
            adapter.per_text(batch) @ -solved
            for batch in tqdm(task.data, desc="gradient of each text", unit="batch")
        ]
    )
    area = rank_statistic(influence, wrong)

    shown = Table(title=task.title, box=box.SIMPLE)
    for column in ("texts", "wrong labels", "wrong among most harmful", "area under the curve"):
        shown.add_column(column, justify="right")
    worst = influence.argsort(descending=True)[: int(wrong.sum())]
    found = wrong[worst].double().mean()
    shown.add_row(str(len(wrong)), str(int(wrong.sum())), f"{found:.0%}", f"{area:.2f}")
    Console(width=max(90, Console().width)).print(shown)
    plot(influence, wrong, "Texts with wrong labels hurt", options.plot)
    print(f"histogram: {options.plot.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
