"""The time of a training step: each variant against the frozen model alone, and against PEFT.

    python -m nox -s bench -- steps
    python -m nox -s bench -- steps --compiled 1 --variants lora dora

A step is a forward and a backward pass of a Qwen3-shaped model with adapters on its seven linear
projections. The floor is the frozen model: its forward pass, and the backward pass down to the
input of the first layer. The three take turns in one process; the figures are medians.
"""

import peft
import torch
from measuring import (
    PROJECTIONS,
    Row,
    alternately,
    floor_step,
    parser_of,
    qwen3,
    ratios_to_floor,
    report,
    tokens,
    training_step,
    with_peft,
)
from tqdm import tqdm

import lora_func as lf

PAIRS = {
    "lora": (lf.LoRA(r=8), lambda: peft.LoraConfig(r=8)),
    "pissa": (
        lf.PiSSA(r=8, niter=4),
        lambda: peft.LoraConfig(r=8, init_lora_weights="pissa_niter_4"),
    ),
    "dora": (lf.DoRA(r=8), lambda: peft.LoraConfig(r=8, use_dora=True)),
    "delora": (lf.DeLoRA(r=8), lambda: peft.DeloraConfig(r=8)),
    "vera": (lf.VeRA(r=256), lambda: peft.VeraConfig(r=256)),
    "ia3": (lf.IA3(), lambda: peft.IA3Config(feedforward_modules=[])),
    "ia3_ff": (lf.IA3FF(), lambda: peft.IA3Config(feedforward_modules=PROJECTIONS)),
    "road": (lf.ROAD(), lambda: peft.RoadConfig()),
    "hra": (lf.HRA(r=8), lambda: peft.HRAConfig(r=8)),
    "oft": (lf.OFT(), lambda: peft.OFTConfig(r=0, oft_block_size=32, use_cayley_neumann=False)),
    "oft, Neumann": (
        lf.OFT(neumann_terms=5),
        lambda: peft.OFTConfig(r=0, oft_block_size=32, use_cayley_neumann=True),
    ),
    "shira": (lf.SHiRA(r=8), lambda: peft.ShiraConfig(r=8)),
    "ssvd": (lf.SSVD(r=64), None),
    "antipasto": (lf.AntiPaSTO(r=16), None),
    "ssteer": (lf.SSteer(r=16), None),
    "bitfit": (lf.BitFit(target_modules=r"(q|k|v|o)_proj$"), None),
}
"""Name -> our config and what makes PEFT's; None where PEFT has no such method."""


def steps_of(name: str, options):
    """The functions that are timed: the floor, our step, and PEFT's if there is one."""
    compiled = torch.compile if options.compiled else lambda function: function
    base = qwen3(options.width, options.layers, options.device, biases=name == "bitfit")
    batch = tokens(options.rows, options.tokens, options.device)
    ours, theirs = PAIRS[name]
    params = lf.init(base, ours)
    call = compiled(lambda params: lf.fcall(base, params, batch))
    functions = {
        "floor": floor_step(compiled(base), batch) if options.compiled else floor_step(base, batch),
        "ours": training_step(params, lambda: call(params)),
    }
    if theirs is not None:
        other = with_peft(qwen3(options.width, options.layers, options.device), theirs())
        run = compiled(other)
        functions["PEFT"] = training_step(dict(other.named_parameters()), lambda: run(**batch).loss)
    return functions


def measure(name: str, options) -> Row:
    torch.compiler.reset()  # after too many variants of one model it would compile no more
    functions = steps_of(name, options)
    slow = name == "hra"  # PEFT builds a dense matrix for each reflection
    seconds = alternately(functions, max(options.repeats // 4, 3) if slow else options.repeats)
    return {"variant": name, "floor ms": 1e3 * seconds["floor"], **ratios_to_floor(seconds)}


def main() -> None:
    parser = parser_of(
        __doc__, width=768, layers=4, rows=2, tokens=64, repeats=20, compiled=0, variants=[*PAIRS]
    )
    options = parser.parse_args()
    rows = [measure(name, options) for name in tqdm(options.variants, unit="variant")]
    name = f"steps-{options.width}-{options.rows}x{options.tokens}"
    name += "-compiled" if options.compiled else ""
    report(name, rows, ["ours / floor", "PEFT / floor"], options)


if __name__ == "__main__":
    main()
