"""On a GPU: steps, captured and compiled steps, memory, sweeps and quantised bases, in one go.

    python -m nox -s gpu
    python -m nox -s gpu -- --parts steps sweeps

The models are Qwen3-shaped, of 0.6 and 8 billion parameters, in bfloat16 with random weights, with
adapters on all seven projections, in the settings of the variants' trials. The floor is the frozen
model's step, PEFT runs the same method, and a captured step is replayed by ``lf.capture``. The
sides of each figure take turns in one process; figures are medians. The first part runs the tests
that need a GPU.

It takes less than eight minutes and writes ``results/gpu-NAME.json``. ``--toy 1`` runs small
models, on a CPU too, where nothing is captured.
"""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import (
    PROJECTIONS,
    Row,
    alternately,
    floor_step,
    machine,
    parser_of,
    peak_of,
    show,
    training_step,
    trials,
    with_peft,
)
from torch import nn
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

import lora_func as lf

VOCABULARY = 32_000
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "head_dim")
SHAPES = {"0.6B": (1024, 3072, 28, 16, 8, 128), "8B": (4096, 12288, 36, 32, 8, 128)}
TOY = (128, 384, 2, 8, 4, 16)
METHODS = {
    name: trial
    for name, trial in trials().items()
    # an exact decomposition of each layer takes minutes
    if trial.peft and not trial.data and getattr(trial.config, "niter", 0) is not None
}
LORA = next(name for name, trial in METHODS.items() if type(trial.config) is lf.LoRA)
LARGE = [name for name, trial in METHODS.items() if type(trial.config) in (lf.LoRA, lf.DoRA)]


def qwen3(shape: str, options: Any, layers: int | None = None) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = dict(zip(SIZES, TOY if options.toy else SHAPES[shape], strict=True))
    sizes |= {"num_hidden_layers": layers} if layers else {}
    with torch.device(options.device):
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, use_cache=False, **sizes))
    return model.bfloat16().requires_grad_(False).train()


def tokens(rows: int, length: int, options: Any) -> dict[str, torch.Tensor]:
    length = min(length, 8) if options.toy else length
    ids = torch.randint(0, VOCABULARY, (rows, length), device=options.device)
    return {"input_ids": ids, "labels": ids}


def adapter(model: nn.Module, name: str) -> lf.Params:
    return lf.init(model, METHODS[name].config)


def stack_of(model: nn.Module, adapters: int) -> lf.Params:
    trained, constants = lf.partition(lf.stack([adapter(model, LORA)] * adapters))
    return {key: leaf.detach().requires_grad_() for key, leaf in trained.items()} | constants


def captured(step: Callable[[], Any], options: Any) -> Callable[[], Any] | None:
    """The step as a CUDA graph; None without a GPU."""
    return lf.capture(step, copies=False) if options.device == "cuda" else None


def milliseconds(functions: dict[str, Callable[[], Any] | None], options: Any) -> Row:
    there = {name: function for name, function in functions.items() if function is not None}
    return {f"{k} ms": 1e3 * v for k, v in alternately(there, options.repeats).items()}


def steps(options: Any, shape: str = "0.6B", rows: int = 1, length: int = 64) -> list[Row]:
    model, batch = qwen3(shape, options), tokens(rows, length, options)
    floor = floor_step(model, batch)
    found = []
    for name in tqdm(options.methods, desc=f"steps, {shape}", unit="method"):
        params = adapter(model, name)
        ours = training_step(params, lambda p=params: lf.fcall(model, p, batch))
        other = with_peft(qwen3(shape, options), METHODS[name].peft())
        theirs = training_step(dict(other.named_parameters()), lambda o=other: o(**batch).loss)
        sides = {"floor": floor, "ours": ours, "PEFT": theirs}
        sides |= {"captured floor": captured(floor, options), "captured": captured(ours, options)}
        row = {"method": name, "model": shape, "tokens": f"{rows} x {length}"}
        row |= milliseconds(sides, options)
        row["PEFT / ours"] = row["PEFT ms"] / row["ours ms"]
        if "captured ms" in row:
            row["PEFT / captured"] = row["PEFT ms"] / row["captured ms"]
            row["captured / captured floor"] = row["captured ms"] / row["captured floor ms"]
        row["MiB"] = peak_of(lambda: model(**batch), ours, 1)["MiB"]
        row["PEFT MiB"] = peak_of(lambda o=other: o(**batch), theirs, 1)["MiB"]
        found.append(row)
        del params, other, ours, theirs, sides
        _free()
    return found


def large_steps(options: Any) -> list[Row]:
    options.methods = [name for name in options.methods if name in LARGE]
    return steps(options, "8B", 2, 1024)


def sweeps(options: Any) -> list[Row]:
    model, found = qwen3("0.6B", options), []
    params, other = adapter(model, LORA), with_peft(qwen3("0.6B", options), METHODS[LORA].peft())
    for adapters, length in tqdm([(8, 128), (32, 128), (8, 1024)], desc="sweeps", unit="sweep"):
        stack, batch = stack_of(model, adapters), tokens(1, length, options)
        wide = {name: ids.repeat(adapters, 1) for name, ids in batch.items()}
        lf.vcall(model, stack, batch)  # checks that the model keeps rows apart
        swept = training_step(stack, lambda s=stack, b=batch: lf.vcall(model, s, b).sum())
        sides = {
            "sweep": swept,
            "captured sweep": captured(swept, options),
            "ceiling": training_step(params, lambda w=wide: lf.fcall(model, params, w)),
            "PEFT": training_step(dict(other.named_parameters()), lambda b=batch: other(**b).loss),
        }
        row = {"sweep": f"{adapters} x {length}", **milliseconds(sides, options)}
        row["of the ceiling"] = row["ceiling ms"] / row["sweep ms"]
        row["K PEFT / sweep"] = adapters * row["PEFT ms"] / row["sweep ms"]
        if "captured sweep ms" in row:
            row["K PEFT / captured"] = adapters * row["PEFT ms"] / row["captured sweep ms"]
        found.append(row)
        del stack, swept, sides
        _free()
    return found


def quantised(options: Any) -> list[Row]:
    import bitsandbytes as bnb

    def linear4(old: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=False,
            quant_type="nf4",
            compute_dtype=torch.bfloat16,
        )
        weight = old.weight.data.cpu()
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=new)
        return new

    def linear8(old: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear8bitLt(
            old.in_features, old.out_features, bias=False, has_fp16_weights=False, threshold=6.0
        )
        new.weight = bnb.nn.Int8Params(old.weight.data.cpu().half(), requires_grad=False)
        return new

    def base(make: Callable[[nn.Linear], nn.Module]) -> Qwen3ForCausalLM:
        model = qwen3("0.6B", options)
        for path, module in [*model.named_modules()]:
            if path.endswith(tuple(PROJECTIONS)):
                model.set_submodule(path, make(module).to(options.device))
        return model.requires_grad_(False)

    found = []
    for kind, make in tqdm({"nf4": linear4, "int8": linear8}.items(), desc="quantised"):
        model, batch = base(make), tokens(2, 512, options)
        params = adapter(model, LORA)
        ours = training_step(params, lambda m=model, p=params, b=batch: lf.fcall(m, p, b))
        other = with_peft(base(make), METHODS[LORA].peft())
        leaves = dict(other.named_parameters())
        theirs = training_step(leaves, lambda o=other, b=batch: o(**b).loss)
        row = {"base": kind, **milliseconds({"ours": ours, "PEFT": theirs}, options)}
        found.append(row | {"PEFT / ours": row["PEFT ms"] / row["ours ms"]})
        del params, other, leaves, ours, theirs
        _free()
    return found


def compiled(options: Any) -> list[Row]:
    model, batch = qwen3("0.6B", options, layers=4), tokens(1, 64, options)
    params, second = ({k: v.detach() for k, v in adapter(model, LORA).items()} for _ in range(2))
    stacks = [lf.stack([one, one]) for one in (params, second)]
    calls = {
        "fcall": (lf.fcall, params, second),
        "grad": (torch.func.grad(lf.fcall, argnums=1), params, second),
        "vcall": (lf.vcall, *stacks),
    }
    lf.vcall(model, stacks[0], batch)
    found = []
    for mode in tqdm(("default", "reduce-overhead"), desc="compiled", unit="mode"):
        for name, (function, first, other) in calls.items():
            torch.compiler.reset()
            run = torch.compile(function, mode=mode)
            start = time.perf_counter()
            run(model, first, batch)
            seconds = time.perf_counter() - start
            with torch.compiler.set_stance("fail_on_recompile"):
                run(model, other, batch)
            functions = {
                "eager": lambda f=function, p=first: f(model, p, batch),
                "compiled": lambda r=run, p=first: r(model, p, batch),
            }
            row = {"call": name, "mode": mode, "first call s": seconds}
            found.append(row | milliseconds(functions, options))
    return found


def tests(options: Any) -> list[Row]:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:] or ["no output"]
    return [{"tests": last[0].strip("= "), "s": time.perf_counter() - start}]


PARTS = {
    "tests": tests,
    "steps": steps,
    "large": large_steps,
    "sweeps": sweeps,
    "quantised": quantised,
    "compiled": compiled,
}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = parser_of(__doc__, repeats=7, toy=0, parts=[*PARTS], methods=[*METHODS])
    options = parser.parse_args()
    found: dict[str, list[Row]] = {}
    for part in tqdm(options.parts, unit="part"):
        try:
            found[part] = PARTS[part](options)
        except Exception as error:  # the other parts still count
            found[part] = [{"error": f"{type(error).__name__}: {error}"}]
        show(part, found[part])
        _free()
    here = machine(options.device)
    name = here["processor"].lower().replace(" ", "-") if options.device == "cuda" else "cpu"
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {"repeats": options.repeats, "toy": bool(options.toy)}
    text = json.dumps({"machine": here, "settings": settings, "parts": found}, indent=1)
    (options.out / f"gpu-{name}.json").write_text(text)
    if any("error" in row for rows in found.values() for row in rows):
        sys.exit("a part failed")


if __name__ == "__main__":
    main()
