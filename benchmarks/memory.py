"""The peak memory of training steps: each variant and PEFT, and sweeps of several sizes.

    python -m nox -s bench -- memory

Each figure comes from its own process: the peak of three steps minus the peak of a forward pass
without gradients. It is resident memory on a CPU, and allocated memory on a GPU.
"""

import json

from measuring import (
    Row,
    in_processes,
    parser_of,
    peak_of,
    qwen3,
    report,
    tokens,
    trained_stack,
    training_step,
    with_peft,
)
from steps import TRIALS

import lora_func as lf


def measure(name: str, side: str, adapters: int, options) -> Row:
    base = qwen3(options.width, options.layers, options.device)
    batch = tokens(options.rows, options.tokens, options.device)
    trial = TRIALS[name]
    if side == "PEFT":
        model = with_peft(base, trial.peft())
        step = training_step(dict(model.named_parameters()), lambda: model(**batch).loss)
        return peak_of(lambda: model(**batch), step)
    params = trial.init(base, options.device)
    if side == "ours":
        step = training_step(params, lambda: lf.fcall(base, params, batch))
        return peak_of(lambda: lf.fcall(base, params, batch), step)
    stack = trained_stack(base, trial, adapters, options.device)
    step = training_step(stack, lambda: lf.vcall(base, stack, batch, check="never").sum())
    return peak_of(lambda: lf.fcall(base, params, batch), step)


def main() -> None:
    defaults = {"width": 768, "layers": 4, "rows": 2, "tokens": 256}
    parser = parser_of(__doc__, **defaults, variants=[*TRIALS], adapters=[1, 2, 4, 8, 16])
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(*options.only, options)))
        return
    sides = [
        (name, side, 1)
        for name in options.variants
        for side in ("ours", "PEFT")
        if side == "ours" or TRIALS[name].peft
    ]
    sweeps = [(options.variants[0], "sweep", adapters) for adapters in options.adapters]
    found = dict(zip(sides + sweeps, in_processes(__file__, sides + sweeps), strict=True))
    rows: list[Row] = []
    for name in options.variants:
        ours, theirs = found[name, "ours", 1], found.get((name, "PEFT", 1))
        row: Row = {"variant": name, "MiB": ours["MiB"]}
        if theirs and theirs["MiB"]:
            row |= {"PEFT MiB": theirs["MiB"], "ours / PEFT": ours["MiB"] / theirs["MiB"]}
        rows.append(row)
    report("memory", rows, ["ours / PEFT"], options)
    rows = [{"K": sweep[2], "MiB": found[sweep]["MiB"]} for sweep in sweeps]
    for row in rows:
        row["of K times one"] = row["MiB"] / (row["K"] * rows[0]["MiB"] or 1)
    report("memory-sweep", rows, ["of K times one"], options)


if __name__ == "__main__":
    main()
