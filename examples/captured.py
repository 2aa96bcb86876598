"""Capture a whole training step as a CUDA graph: the host then launches nothing but the graph.

    python examples/captured.py
    python examples/captured.py --width 2048 --layers 16 --tokens 128

A LoRA is trained on a Qwen3-shaped bfloat16 model with random weights: forward pass, backward pass,
clipping and AdamW. The step runs as it is, and captured by ``lf.capture``, which takes a GPU. On a
machine without one the example says so, and trains a few steps uncaptured.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import matplotlib
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

import lora_func as lf

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plots import finish, line

VOCABULARY = 512


@dataclass
class Run:
    """The losses of one way to run the steps, and the median milliseconds of a step."""

    name: str
    losses: list[float] = field(default_factory=list)
    milliseconds: float = 0.0


def frozen_model(options, device: str) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=options.width // 8,
        use_cache=False,
    )
    return Qwen3ForCausalLM(config).to(device, torch.bfloat16).requires_grad_(False).train()


def step_of(model: Qwen3ForCausalLM, device: str) -> Callable[[Tensor], Tensor]:
    """A training step: a function of the ids alone, which changes its adapter and optimizer."""
    params = lf.init(model, lf.LoRA(r=16, target_modules=r"(q|k|v|o|gate|up|down)_proj$"))
    leaves = [*lf.partition(params)[0].values()]
    optimizer = torch.optim.AdamW(leaves, lr=1e-3, capturable=device == "cuda")

    def step(ids: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = lf.fcall(model, params, {"input_ids": ids, "labels": ids})
        loss.backward()
        lf.clip_grad_norm(params, 1.0)
        optimizer.step()
        return loss.detach()

    return step


def train(name: str, step: Callable[[Tensor], Tensor], batches: Tensor) -> Run:
    run, seconds = Run(name), []
    for ids in tqdm(batches, desc=name, unit="step"):
        start = time.perf_counter()
        run.losses.append(step(ids).item())  # item() waits for the GPU
        seconds.append(time.perf_counter() - start)
    run.milliseconds = 1e3 * median(seconds)
    return run


def table(runs: Sequence[Run], title: str) -> Table:
    shown = Table(title=title, box=box.SIMPLE)
    for column in ("step", "milliseconds", "times as fast", "loss"):
        shown.add_column(column, justify="left" if column == "step" else "right")
    for run in runs:
        shown.add_row(
            run.name,
            f"{run.milliseconds:.2f}",
            f"{runs[0].milliseconds / run.milliseconds:.1f}",
            f"{run.losses[0]:.3f} → {run.losses[-1]:.3f}",
        )
    return shown


def plot(runs: Sequence[Run], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, run in enumerate(runs):
        label = f"{run.name}, {run.milliseconds:.1f} ms a step"
        axes.plot(run.losses, label=label, **line(i, len(runs)))
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend()
    finish(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train both ways; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1024 if torch.cuda.is_available() else 64)
    parser.add_argument("--layers", type=int, default=28 if torch.cuda.is_available() else 2)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--plot", type=Path, default=Path("captured.png"))
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = frozen_model(options, device)
    # words of few kinds, so that there is something to learn
    batches = torch.randint(0, 16, (options.steps, 1, options.tokens)).to(device)
    runs = [train("as it is", step_of(model, device), batches)]
    if device == "cuda":
        captured = lf.capture(step_of(model, device), batches[0])
        runs.append(train("captured", captured, batches))
    else:
        print("lf.capture makes a CUDA graph, and this machine has no GPU: nothing was captured")
    title = f"A training step of 1 x {options.tokens} tokens, {device}"
    Console(width=max(90, Console().width)).print(table(runs, title))
    plot(runs, options.plot)
    print(f"losses: {options.plot.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
