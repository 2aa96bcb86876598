"""Activation checkpointing: peak memory and time of one gradient.

    python -m nox -s bench -- checkpointing

A LoRA on all linear layers of a frozen Qwen3-shaped model is differentiated by autograd and by
``torch.func.grad`` (it keeps the graph for higher derivatives), with and without
``model.activation_checkpointing_enable()``. Each figure comes from its own process. Memory is the
peak minus the peak after a forward pass without gradients.
"""

import json

import torch
from measuring import Row, in_processes, parser_of, peak_of, qwen3, ratios_to_first, report, tokens

import lora_func as lf

WAYS = ("autograd", "torch.func.grad")


def measure(way: str, checkpointing: bool, options) -> Row:
    model = qwen3(options.width, options.layers, options.device)
    batch = tokens(options.rows, options.tokens, options.device)
    params = lf.init(model, lf.LoRA(r=8))
    if checkpointing:
        model.activation_checkpointing_enable()

    def gradient() -> None:
        if way == "autograd":
            lf.fcall(model, params, batch).backward()
        else:
            torch.func.grad(lf.fcall, argnums=1)(model, params, batch)

    row = {"way": way + ", checkpointing" * checkpointing}
    return row | peak_of(lambda: lf.fcall(model, params, batch), gradient, options.repeats)


def main() -> None:
    parser = parser_of(__doc__, width=256, layers=12, rows=2, tokens=256, repeats=3)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(*options.only, options)))
        return
    ways = [(way, checkpointing) for checkpointing in (False, True) for way in WAYS]
    rows = in_processes(__file__, ways)
    ratios_to_first(rows, "MiB", "s")
    report("checkpointing", rows, ["MiB ratio", "s ratio"], options)


if __name__ == "__main__":
    main()
