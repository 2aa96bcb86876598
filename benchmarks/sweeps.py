"""Sweeps: K adapters in one call, compared with K steps of one adapter each.

    python -m nox -s bench -- sweeps

All adapters train on a Qwen3-shaped model with the same batch of one row. ``vcall`` and
``torch.vmap`` are compared with K single-adapter steps of lora_func and of PEFT, and with the
ceiling: one adapter on K rows, the upper bound for a sweep. All run alternately in one process.
"""

import torch
from measuring import (
    Row,
    alternately,
    parser_of,
    qwen3,
    report,
    tokens,
    trained_stack,
    training_step,
    with_peft,
)
from steps import TRIALS
from tqdm import tqdm

import lora_func as lf


def measure(adapters: int, length: int, options) -> Row:
    base = qwen3(options.width, options.layers, options.device)
    trial = TRIALS[options.variant]
    batch = tokens(1, length, options.device)
    wide = tokens(adapters, length, options.device)
    params = trial.init(base, options.device)
    stacked = trained_stack(base, trial, adapters, options.device)
    other = with_peft(qwen3(options.width, options.layers, options.device), trial.peft())
    vmapped = torch.vmap(lf.fcall, in_dims=(None, 0, None))
    functions = {
        "vcall": training_step(stacked, lambda: lf.vcall(base, stacked, batch).sum()),
        "vmap": training_step(stacked, lambda: vmapped(base, stacked, batch).sum()),
        "solo": training_step(params, lambda: lf.fcall(base, params, batch)),
        "PEFT": training_step(dict(other.named_parameters()), lambda: other(**batch).loss),
        "ceiling": training_step(params, lambda: lf.fcall(base, params, wide)),
    }
    if adapters * length > options.vmapped:
        del functions["vmap"]  # vmap stores the full attention matrix of each adapter
    seconds = alternately(functions, options.repeats)
    together = seconds["vcall"]
    return {
        "K x tokens": f"{adapters} x {length}",
        "steps/s": adapters / together,
        "over K of PEFT": adapters * seconds["PEFT"] / together,
        "over K of ours": adapters * seconds["solo"] / together,
        "over vmap": seconds["vmap"] / together if "vmap" in seconds else None,
        "of the ceiling": seconds["ceiling"] / together,
    }


def main() -> None:
    parser = parser_of(
        __doc__,
        width=256,
        layers=4,
        repeats=12,
        variant="lora",
        vmapped=2048,
        sizes=["32x8", "8x16"]
        + [f"{K}x32" for K in (1, 2, 4, 8, 16, 32)]
        + [f"{K}x128" for K in (1, 2, 4, 8, 16, 32)]
        + [f"{K}x1024" for K in (1, 2, 4, 8)],
    )
    options = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes]
    rows = [measure(*size, options) for size in tqdm(sizes, unit="size")]
    name = f"sweeps-{options.variant}-{options.width}"
    report(name, rows, ["over K of PEFT", "over K of ours", "of the ceiling"], options)


if __name__ == "__main__":
    main()
