"""What the benchmarks share: a model, peak memory, and a process for each measurement."""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 1000
Figures = dict[str, float]


def parser_of(description: str, ways: Sequence[str], **defaults: int) -> argparse.ArgumentParser:
    """Make the command line that the benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {**defaults, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--way", choices=ways, help=argparse.SUPPRESS)
    return parser


def qwen3(width: int, layers: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=width // 8,
        use_cache=False,
    )
    return Qwen3ForCausalLM(config).requires_grad_(False)


def tokens(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def measured(forward: Callable[[], object], step: Callable[[], object], repeats: int) -> Figures:
    """The peak memory in MiB above what a forward pass needed, and the seconds of a step."""
    with torch.no_grad():
        forward()
    before, seconds = _peak(), []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"MiB": _peak() - before, "s": median(seconds), "MiB in all": _peak()}


def _peak() -> float:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def in_processes(file: str, rows: Sequence[Sequence[str]]) -> list[Figures]:
    """Run a benchmark's file once for each row of arguments; it prints its figures as JSON."""

    def run(row: Sequence[str]) -> Figures:
        command = [sys.executable, file, *row]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    return [run(row) for row in tqdm(rows, unit="process")]


def show(names: Sequence[str], found: Sequence[Figures], path: Path | None) -> None:
    """Print a table with ratios to the first row; write the figures as JSON if asked."""
    shown = Table(box=box.SIMPLE, caption="ratios to the first row")
    shown.add_column("")
    for column in ("peak MiB", "ratio", "seconds", "ratio"):
        shown.add_column(column, justify="right")
    for name, figures in zip(names, found, strict=True):
        cells = [name]
        for unit, digits in (("MiB", 0), ("s", 2)):
            ratio = figures[unit] / found[0][unit]
            cells += [f"{figures[unit]:.{digits}f}", f"{ratio:.2f}"]
        shown.add_row(*cells)
    Console(width=max(80, Console().width)).print(shown)
    if path:
        path.write_text(json.dumps(dict(zip(names, found, strict=True)), indent=2))
