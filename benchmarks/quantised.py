"""Time and memory of a training step on a 4-bit base: lora_func and PEFT's QLoRA.

    python -m nox -s bench -- quantised

A Qwen3-shaped model is quantised to nf4 with double quantisation. Each process loads it and trains
a LoRA of rank 8 on all linear layers with AdamW. Memory is the peak minus the peak after a forward
pass without gradients.
"""

import json
import tempfile

import peft
import torch
from measuring import Row, in_processes, parser_of, peak_of, qwen3, ratios_to_first, report, tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lora_func as lf

WAYS = ("PEFT", "lora_func")


def quantise(width: int, layers: int, folder: str) -> None:
    """Save a quantised model, so that the measured processes never load the dense model."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    with tempfile.TemporaryDirectory() as dense:
        qwen3(width, layers).save_pretrained(dense)
        model = AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
    model.save_pretrained(folder)


def measure(way: str, folder: str, options) -> Row:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").train()
    batch = tokens(options.rows, options.tokens)
    if way == "PEFT":
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

    return {"way": way} | peak_of(loss, step, options.repeats)


def main() -> None:
    parser = parser_of(__doc__, width=1024, layers=8, rows=2, tokens=512, repeats=3)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(*options.only, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        quantise(options.width, options.layers, folder)
        rows = in_processes(__file__, [(way, folder) for way in WAYS])
    ratios_to_first(rows, "MiB", "s")
    report("quantised", rows, ["MiB ratio", "s ratio"], options)


if __name__ == "__main__":
    main()
