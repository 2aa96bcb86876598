"""What activation checkpointing saves: peak memory and time of one gradient, each in a process.

    python -m nox -s bench -- checkpointing

A Qwen3-shaped model is frozen, a LoRA on all its linear layers is differentiated: by autograd and
by ``torch.func.grad``, which keeps the backward pass for another derivative, with and without
``model.activation_checkpointing_enable()``. Memory is what a process needs at its peak above what
it needed after a forward pass without gradients.
"""

import argparse
import json
import sys

import torch
from measuring import Figures, in_processes, measured, parser_of, qwen3, show, tokens

import lora_func as lf

WAYS = ("autograd", "torch.func.grad")


def measure(options) -> Figures:
    model, batch = (
        qwen3(options.width, options.layers).train(),
        tokens(options.rows, options.tokens),
    )
    params = lf.init(model, lf.LoRA(r=8))
    if options.checkpointing:
        model.activation_checkpointing_enable()

    def gradient() -> None:
        if options.way == "autograd":
            lf.fcall(model, params, batch).backward()
        else:
            torch.func.grad(lf.fcall, argnums=1)(model, params, batch)

    return measured(lambda: lf.fcall(model, params, batch), gradient, options.repeats)


def main() -> None:
    """Measure every way, or in a child process one."""
    parser = parser_of(__doc__, WAYS, width=256, layers=12, rows=2, tokens=256)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    ways = [["--way", way, *again] for again in ([], ["--checkpointing"]) for way in WAYS]
    found = in_processes(__file__, [[*sys.argv[1:], *way] for way in ways])
    names = [way + again for again in ("", ", checkpointing") for way in WAYS]
    show(names, found, options.json)


if __name__ == "__main__":
    main()
