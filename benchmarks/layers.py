"""The time of a LoRA step on other layer types, relative to the frozen layer and PEFT.

    python -m nox -s bench -- layers

The layers are an embedding with a large vocabulary, a convolution, and a mixture of experts with
stacked weights. The floor is the frozen layer: its forward pass, and the backward pass to its input
if the input is differentiable.
"""

import copy

import peft
import torch
from measuring import Row, alternately, parser_of, ratios_to_floor, report, training_step
from torch import nn
from tqdm import tqdm
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import lora_func as lf

WEIGHTS = ["experts.gate_up_proj", "experts.down_proj"]


def experts(width: int) -> nn.Module:
    config = Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=width, num_experts=8, num_experts_per_tok=2
    )
    config._experts_implementation = "grouped_mm"
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def layers(options) -> dict:
    """Layer name -> module, input, and targets for lora_func and PEFT."""
    width, vocabulary = options.width, options.vocabulary
    by_module = {"target_modules": ["0"]}
    return {
        "embedding": (
            nn.Embedding(vocabulary, width),
            torch.randint(0, vocabulary, (2, 64)),
            by_module,
        ),
        "convolution": (
            nn.Conv2d(width // 4, width // 4, 3, padding=1),
            torch.randn(2, width // 4, 28, 28, requires_grad=True),
            by_module,
        ),
        "experts": (
            experts(width),
            torch.randn(2, 64, width, requires_grad=True),
            {"target_modules": [], "target_parameters": WEIGHTS},
        ),
    }


def measure(name: str, options) -> Row:
    torch.manual_seed(0)
    module, x, targets = layers(options)[name]
    model = nn.Sequential(module).requires_grad_(False).to(options.device)
    x = x.detach().to(options.device).requires_grad_(x.requires_grad)
    params = lf.init(model, lf.LoRA(r=8, **targets))
    other = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=8, **targets))

    def floor() -> None:
        y = model(x)
        if y.requires_grad:
            y.sum().backward()

    seconds = alternately(
        {
            "floor": floor,
            "ours": training_step(params, lambda: lf.fcall(model, params, (x,)).sum()),
            "PEFT": training_step(dict(other.named_parameters()), lambda: other(x).sum()),
        },
        options.repeats,
    )
    spent = {f"{side} ms": 1e3 * of_side for side, of_side in seconds.items()}
    return {"layer": name, **spent, **ratios_to_floor(seconds)}


def main() -> None:
    options = parser_of(__doc__, width=768, vocabulary=150_000, repeats=20).parse_args()
    names = tqdm(layers(options), unit="layer")
    report("layers", [measure(name, options) for name in names], ["PEFT / ours"], options)


if __name__ == "__main__":
    main()
