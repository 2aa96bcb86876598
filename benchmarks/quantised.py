"""What training on a 4-bit base costs: a step of ours and of PEFT's QLoRA, each in a process.

    python -m nox -s bench -- quantised

A Qwen3-shaped model is quantised to nf4 with double quantisation; each process loads it, and trains
a LoRA of rank 8 on all its linear layers with AdamW. Memory is what a process needs at its peak
above what it needed after a forward pass without gradients.
"""

import argparse
import json
import sys
import tempfile

import peft
import torch
from measuring import Figures, in_processes, measured, parser_of, qwen3, show, tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lora_func as lf

WAYS = ("PEFT", "lora_func")


def quantise(width: int, layers: int, folder: str) -> None:
    """Write a quantised model, so that no process that is measured ever holds a dense one."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    with tempfile.TemporaryDirectory() as dense:
        qwen3(width, layers).save_pretrained(dense)
        model = AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
    model.save_pretrained(folder)


def measure(options) -> Figures:
    model = AutoModelForCausalLM.from_pretrained(options.folder, device_map="cpu").train()
    batch = tokens(options.rows, options.tokens)
    if options.way == "PEFT":
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
        leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def loss() -> torch.Tensor:
            return model(**batch).loss
    else:
        params = lf.init(model, lf.LoRA(r=8))
        leaves = [*lf.partition(params)[0].values()]

        def loss() -> torch.Tensor:
            return lf.fcall(model, params, batch)

    optimizer = torch.optim.AdamW(leaves)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return measured(loss, step, options.repeats)


def main() -> None:
    """Measure both, or in a child process one."""
    parser = parser_of(__doc__, WAYS, width=1024, layers=8, rows=2, tokens=512)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        quantise(options.width, options.layers, folder)
        rows = [[*sys.argv[1:], "--way", way, "--folder", folder] for way in WAYS]
        show(WAYS, in_processes(__file__, rows), options.json)


if __name__ == "__main__":
    main()
