"""The time of a training step: each variant relative to the frozen model and to PEFT.

    python -m nox -s bench -- steps
    python -m nox -s bench -- steps --compiled 1 --variants lora dora

A step is a forward and a backward pass of a Qwen3-shaped model with adapters on its seven linear
projections. The floor is the frozen model: its forward pass, and the backward pass down to the
input of the first layer. All three run alternately in one process; the figures are medians.
"""

import torch
from measuring import (
    Row,
    alternately,
    floor_step,
    parser_of,
    qwen3,
    ratios_to_floor,
    report,
    tokens,
    training_step,
    trials,
    with_peft,
)
from tqdm import tqdm

import lora_func as lf

TRIALS = trials()


def steps_of(name: str, options):
    """The timed functions: the floor, lora_func's step, and PEFT's step if it exists."""
    compiled = torch.compile if options.compiled else lambda function: function
    base = qwen3(options.width, options.layers, options.device)
    batch = tokens(options.rows, options.tokens, options.device)
    trial = TRIALS[name]
    params = trial.init(base, options.device)
    call = compiled(lambda params: lf.fcall(base, params, batch))
    functions = {
        "floor": floor_step(compiled(base), batch) if options.compiled else floor_step(base, batch),
        "ours": training_step(params, lambda: call(params)),
    }
    if trial.peft is not None:
        other = with_peft(qwen3(options.width, options.layers, options.device), trial.peft())
        run = compiled(other)
        functions["PEFT"] = training_step(dict(other.named_parameters()), lambda: run(**batch).loss)
    return functions


def measure(name: str, options) -> Row:
    torch.compiler.reset()  # otherwise the recompile limit stops compilation
    functions = steps_of(name, options)
    first = alternately(functions, 1, warmups=0)
    slow = max(first.values()) > 8 * first["floor"]
    seconds = alternately(functions, max(options.repeats // 4, 3) if slow else options.repeats)
    return {"variant": name, "floor ms": 1e3 * seconds["floor"], **ratios_to_floor(seconds)}


def main() -> None:
    parser = parser_of(
        __doc__, width=768, layers=4, rows=2, tokens=64, repeats=20, compiled=0, variants=[*TRIALS]
    )
    options = parser.parse_args()
    rows = [measure(name, options) for name in tqdm(options.variants, unit="variant")]
    name = f"steps-{options.width}-{options.rows}x{options.tokens}"
    name += "-compiled" if options.compiled else ""
    report(name, rows, ["ours / floor", "PEFT / floor"], options)


if __name__ == "__main__":
    main()
