"""Shared by the benchmarks: models, alternating timing, peak memory, tables and plots."""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import peft
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

import lora_func as lf
from lora_func.variants import all_variants

mpl.use("Agg")

VOCABULARY = 1000
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def parser_of(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """Make the shared argument parser; an option with a list as default takes several values."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = {"device": "cuda" if torch.cuda.is_available() else "cpu", "out": RESULTS}
    for name, default in (defaults | shared).items():
        several = {"nargs": "+"} if isinstance(default, list) else {}
        kind = type(default[0] if several else default)
        parser.add_argument(f"--{name}", type=kind, default=default, **several)
    # a child process runs only this measurement
    parser.add_argument("--only", type=json.loads, help=argparse.SUPPRESS)
    return parser


def qwen3(width: int, layers: int, device: str = "cpu", biases: bool = False) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=width // 8,
        attention_bias=biases,
        use_cache=False,
    )
    return Qwen3ForCausalLM(config).requires_grad_(False).train().to(device)


def tokens(rows: int, length: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}


class Trial(NamedTuple):
    """A variant to measure.

    Attributes:
        config: The variant's config.
        data: True if ``init`` needs calibration data.
        peft: Builds PEFT's config for the same method; None if PEFT lacks the method.
    """

    config: lf.AdapterConfig
    data: bool
    peft: Callable[[], peft.PeftConfig] | None

    def init(self, model: torch.nn.Module, device: str, seed: int = 0) -> lf.Params:
        data = [tokens(4, 64, device)] if self.data else None
        if self.data and self.config.calibration == "pairs":
            data = [(tokens(4, 64, device), tokens(4, 32, device))]
        return lf.init(model, self.config, seed=seed, data=data)


def trials() -> dict[str, Trial]:
    """The first trial of each variant, and all trials that PEFT also supports."""
    return {
        name: Trial(variant.config(**trial.settings), trial.data, _peft_config(trial))
        for variant in all_variants()
        for i, (name, trial) in enumerate(variant.trials.items())
        if i == 0 or trial.peft
    }


def _peft_config(trial: lf.Trial) -> Callable[[], peft.PeftConfig] | None:
    if trial.peft is None:
        return None
    kind, settings = trial.peft
    settings = dict(settings)
    if settings.get("feedforward_modules"):
        settings["feedforward_modules"] = PROJECTIONS
    if "eva_config" in settings:
        settings["eva_config"] = peft.EvaConfig(**settings["eva_config"])
    return lambda: getattr(peft, kind)(**settings)


def with_peft(model: torch.nn.Module, config: peft.PeftConfig) -> torch.nn.Module:
    config.target_modules = {*PROJECTIONS}
    return peft.get_peft_model(model, config).train()


def floor_step(model: Qwen3ForCausalLM, batch: Mapping[str, torch.Tensor]) -> Callable[[], None]:
    """A step of the frozen model: forward, and backward down to the first layer's input."""
    embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()

    def step() -> None:
        embedded.grad = None
        model(inputs_embeds=embedded, labels=batch["labels"]).loss.backward()

    return step


def training_step(
    leaves: Mapping[str, torch.Tensor], loss: Callable[[], torch.Tensor]
) -> Callable[[], None]:
    trained = [leaf for leaf in leaves.values() if leaf.requires_grad]

    def step() -> None:
        for leaf in trained:
            leaf.grad = None
        loss().backward()

    return step


def trained_stack(
    model: torch.nn.Module, trial: Trial, adapters: int, device: str
) -> dict[str, torch.Tensor]:
    """A stack of adapters with several seeds; the stacked leaves are the trained tensors."""
    each = [trial.init(model, device, seed) for seed in range(adapters)]
    return {
        key: leaf.detach().requires_grad_(each[0][key].requires_grad)
        for key, leaf in lf.stack(each).items()
    }


def alternately(
    functions: Mapping[str, Callable[[], Any]], repeats: int, warmups: int = 2
) -> dict[str, float]:
    """The median seconds of each function, called alternately after some warm-up rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(warmups + repeats):
        for name, function in functions.items():
            _synchronise()
            start = time.perf_counter()
            function()
            _synchronise()
            if round_ >= warmups:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_of(forward: Callable[[], Any], step: Callable[[], Any], repeats: int = 3) -> Row:
    """Peak memory of steps (MiB above a forward pass without gradients) and median seconds."""
    _forget_peak()
    with torch.no_grad():
        forward()
    before, seconds = _peak(), []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        _synchronise()
        seconds.append(time.perf_counter() - start)
    return {"MiB": _peak() - before, "s": median(seconds), "MiB in all": _peak()}


def _peak() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def _forget_peak() -> None:
    """Reset the peak memory counter; the CPU counter can only be reset on Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (resets := Path("/proc/self/clear_refs")).exists():
        resets.write_text("5")


def in_processes(file: str, choices: Sequence[Any]) -> list[Row]:
    """Run a benchmark file in one process per choice; each process prints its row."""

    def run(choice: Any) -> Row:
        command = [sys.executable, file, *sys.argv[1:], "--only", json.dumps(choice)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    return [run(choice) for choice in tqdm(choices, unit="process")]


def ratios_to_floor(seconds: Mapping[str, float]) -> Row:
    """Ratios of lora_func's and PEFT's times to the floor, and to each other; PEFT is optional."""
    row = {"ours / floor": seconds["ours"] / seconds["floor"]}
    if "PEFT" in seconds:
        row["PEFT / floor"] = seconds["PEFT"] / seconds["floor"]
        row["PEFT / ours"] = seconds["PEFT"] / seconds["ours"]
    return row


def ratios_to_first(rows: Sequence[Row], *columns: str) -> None:
    """Add to each row the ratios of its figures to the first row."""
    for row in rows:
        row |= {f"{column} ratio": row[column] / rows[0][column] for column in columns}


def report(name: str, rows: Sequence[Row], plotted: Sequence[str], options: Any) -> None:
    """Print a table, write it as JSON with the machine and the settings, and plot the ratios.

    Args:
        name: Name of the files.
        rows: The first entry is the row's name; the others are figures or None.
        plotted: The ratio columns to plot.
        options: The command-line settings.
    """
    show(name, rows)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(options).items() if key not in _NOT_SETTINGS}
    found = {"machine": machine(options.device), "settings": settings, "rows": rows}
    (options.out / f"{name}-{options.device}.json").write_text(json.dumps(found, indent=1))
    _plot(name, rows, plotted, options)


def show(name: str, rows: Sequence[Row]) -> None:
    """Print a table."""
    columns = [*dict.fromkeys(column for row in rows for column in row)]
    table = Table(box=box.SIMPLE, title=name)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    Console(width=max(100, Console().width)).print(table)


_NOT_SETTINGS = ("out", "only")


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plot(name: str, rows: Sequence[Row], plotted: Sequence[str], options: Any) -> None:
    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.3 * len(rows)))
    height = 0.8 / len(plotted)
    for i, column in enumerate(plotted):
        places = [-(at + i * height) for at in range(len(rows))]
        color = plt.colormaps["cividis"](0.8 * i / max(len(plotted) - 1, 1))
        lengths = [row.get(column) or 0 for row in rows]
        axes.barh(places, lengths, height, label=column, color=color)
    axes.set_yticks([-at for at in range(len(rows))], [str(next(iter(r.values()))) for r in rows])
    axes.axvline(1, color="black", linewidth=0.5)
    widest = max((row.get(column) or 0 for row in rows for column in plotted), default=1)
    axes.set_xscale("log" if widest > 8 else "linear")
    axes.legend(loc="lower right")
    axes.set_title(f"{name}, {options.device}")
    figure.tight_layout()
    figure.savefig(options.out / f"{name}-{options.device}.png", dpi=110)
    plt.close(figure)


def machine(device: str) -> Row:
    processor = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {
        "device": device,
        "processor": processor or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
    }
