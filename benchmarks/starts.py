"""The time of ``init`` for variants that decompose weights or read data, compared with PEFT.

    python -m nox -s bench -- starts

The model is one square linear layer per width. EVA reads 4 batches of 1024 rows.
"""

import peft
import torch
from measuring import Row, alternately, parser_of, report, trials
from torch import nn
from tqdm import tqdm

import lora_func as lf

TRIALS = trials()


class Layer(nn.Module):
    """A model with the interface that PEFT needs: keyword inputs and a ``device``."""

    def __init__(self, width: int, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(width, width, bias=False, device=device).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def measure(name: str, width: int, options) -> Row:
    model = Layer(width, options.device)
    generator = torch.Generator().manual_seed(0)
    trial = TRIALS[name]
    pairs = trial.config.calibration == "pairs"
    shape = (256, 4, width) if pairs else (1024, width)
    data = [{"x": torch.randn(shape, generator=generator)} for _ in range(4)]
    data = [{"x": batch["x"].to(options.device)} for batch in data]
    if pairs:
        data = [(data[0], data[1]), (data[2], data[3])]

    def ours() -> None:
        with torch.no_grad():
            given = data if trial.data else None
            lf.init(model, trial.config, data=given, loss_fn=lambda y, _: y.square().mean())

    def theirs() -> None:
        config = trial.peft()
        config.target_modules = ["layer"]
        wrapped = peft.get_peft_model(Layer(width, options.device), config)
        if getattr(config, "eva_config", None) is not None:
            nothing = dict.fromkeys(("prepare_model_inputs_fn", "prepare_layer_inputs_fn"))
            peft.initialize_lora_eva_weights(wrapped, data, show_progress_bar=False, **nothing)

    functions = {"ours": ours, "PEFT": theirs} if trial.peft else {"ours": ours}
    seconds = alternately(functions, options.repeats, warmups=0)
    other = seconds.get("PEFT")
    return {
        "start": f"{name}, {width}",
        "ours s": seconds["ours"],
        "PEFT s": other,
        "PEFT / ours": other and other / seconds["ours"],
    }


def main() -> None:
    parser = parser_of(__doc__, widths=[1024, 4096], repeats=1, variants=[*TRIALS])
    options = parser.parse_args()
    todo = [(name, width) for width in options.widths for name in options.variants]
    rows = [measure(*one, options) for one in tqdm(todo, unit="start")]
    report("starts", rows, ["PEFT / ours"], options)


if __name__ == "__main__":
    main()
