"""One adapter, trained on several ranks: each has a part of each batch, and gradients are averaged.

    torchrun --standalone --nproc-per-node 2 examples/data_parallel.py
    torchrun --standalone --nproc-per-node 2 examples/data_parallel.py --sharded

``synced(params)`` is the adapter with gradients that are the average over the ranks; the optimizers
then take equal steps. The base is replicated, or with --sharded spread over the ranks by FSDP2.
The task is that of the other examples: which package does a docstring document?
"""

import os
import sys
from collections.abc import Sequence

import matplotlib
import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from tasks import Batch, Task, accuracies, classify, in_epochs, parser_of, smoothed
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

import lora_func as lf
from lora_func.distributed import synced

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plots import finish


def shard(task: Task) -> None:
    """Spread the frozen base over the ranks, layer by layer."""
    for layer in task.model.encoder.encoder.layer:
        fully_shard(layer)
    fully_shard(task.model)


def mine(batch: Batch) -> Batch:
    """This rank's rows of a batch; each rank has as many, and the rest is left out."""
    ranks = dist.get_world_size()
    rows = len(batch["labels"]) // ranks * ranks
    return {name: values[:rows].chunk(ranks)[dist.get_rank()] for name, values in batch.items()}


def train(task: Task, params: lf.Params, options) -> list[float]:
    """Train in place; return the losses over all rows."""
    optimizer = torch.optim.AdamW(lf.partition(params)[0].values(), lr=2e-3)
    batches = [
        b for b in in_epochs(task.data, options.epochs, options.seed) if len(b["labels"]) > 1
    ]
    losses = []
    for batch in tqdm(batches, unit="step", disable=dist.get_rank() > 0):
        optimizer.zero_grad()
        loss = lf.fcall(task.model, synced(params), mine(batch))
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def apart(params: lf.Params) -> float:
    """The largest difference between the adapters of two ranks."""
    flat = torch.cat([leaf.detach().flatten() for leaf in params.values()])
    largest, smallest = flat.clone(), flat.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return (largest - smallest).max().item()


def report(task: Task, losses: list[float], accuracy: float, difference: float, options) -> None:
    shown = Table(title=task.title, box=box.SIMPLE)
    for column in ("ranks", "base", "loss", "held-out accuracy", "ranks differ by"):
        shown.add_column(column, justify="right")
    shown.add_row(
        str(dist.get_world_size()),
        "sharded" if options.sharded else "replicated",
        f"{losses[0]:.2f} → {losses[-1]:.2f}",
        f"{accuracy:.1%}",
        f"{difference:g}",
    )
    Console(width=max(90, Console().width)).print(shown)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(smoothed(losses), color="black")
    axes.set(xlabel="step", ylabel="training loss (mean of ten steps)", title=task.question)
    finish(figure, options.plot)
    print(f"losses: {options.plot.resolve()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train on all ranks; return the exit status."""
    small = {"epochs": 1, "packages": 6, "most": 80, "length": 40, "batch_size": 16}
    parser = parser_of(__doc__, "data_parallel.png", **small)
    parser.add_argument("--sharded", action="store_true", help="spread the base over the ranks")
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        sys.exit("start the ranks with torchrun --standalone --nproc-per-node 2 " + __file__)
    dist.init_process_group("gloo")
    task = classify(options)
    task.model.requires_grad_(False)
    params = lf.init(task.model, [lf.LoRA(r=8, layers=task.layers), task.head], seed=options.seed)
    if options.sharded:
        shard(task)
    losses = train(task, params, options)
    (accuracy,) = accuracies(task, [lf.stack([params])])
    difference = apart(params)
    if dist.get_rank() == 0:
        report(task, losses, accuracy, difference, options)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
