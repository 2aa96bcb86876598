"""What activation checkpointing saves: peak memory and time of one gradient, each in a process.

    python -m nox -s bench

A Qwen3-shaped model is frozen, a LoRA on all its linear layers is differentiated: by autograd and
by ``torch.func.grad``, which keeps the backward pass for another derivative, with and without
``model.activation_checkpointing_enable()``. Memory is what a process needs at its peak above what
it needed after a forward pass without gradients; time and memory are given as ratios to autograd
without checkpointing.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

import lora_func as lf

WAYS = ("autograd", "torch.func.grad")


def setting(options) -> tuple[torch.nn.Module, lf.Params, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    width = options.width
    config = Qwen3Config(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=width // 8,
        use_cache=False,
    )
    model = Qwen3ForCausalLM(config).requires_grad_(False).train()
    ids = torch.randint(0, 1000, (options.rows, options.tokens))
    return model, lf.init(model, lf.LoRA(r=8)), {"input_ids": ids, "labels": ids}


def gradient(way: str, model, params, batch) -> None:
    if way == "autograd":
        lf.fcall(model, params, batch).backward()
    else:
        torch.func.grad(lf.fcall, argnums=1)(model, params, batch)


def peak() -> float:
    """The largest resident size of this process so far, in MiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def measure(way: str, checkpointing: bool, options) -> dict[str, float]:
    model, params, batch = setting(options)
    if checkpointing:
        model.activation_checkpointing_enable()
    with torch.no_grad():
        lf.fcall(model, params, batch)
    before, seconds = peak(), []
    for _ in range(options.repeats):
        start = time.perf_counter()
        gradient(way, model, params, batch)
        seconds.append(time.perf_counter() - start)
    return {"MiB": peak() - before, "s": median(seconds)}


def in_a_process(way: str, checkpointing: bool, arguments: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, *arguments, "--way", way]
    done = subprocess.run(
        command + ["--checkpointing"] * checkpointing, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure every way, or in a child process one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.checkpointing, options)))
        return
    rows = [(way, checkpointing) for checkpointing in (False, True) for way in WAYS]
    found = [in_a_process(*row, sys.argv[1:]) for row in tqdm(rows, unit="process")]
    shown = Table(box=box.SIMPLE, caption="ratios to the first row")
    for column in ("gradient by", "checkpointing", "peak MiB", "ratio", "seconds", "ratio"):
        shown.add_column(column, justify="right")
    for (way, checkpointing), figures in zip(rows, found, strict=True):
        cells = [way, "yes" if checkpointing else "no"]
        for unit, digits in (("MiB", 0), ("s", 2)):
            ratio = figures[unit] / found[0][unit]
            cells += [f"{figures[unit]:.{digits}f}", f"{ratio:.2f}"]
        shown.add_row(*cells)
    Console(width=max(80, Console().width)).print(shown)
    if options.json:
        names = [" ".join([way, "checkpointing"][: 1 + again]) for way, again in rows]
        options.json.write_text(json.dumps(dict(zip(names, found, strict=True)), indent=2))


if __name__ == "__main__":
    main()
