"""The command line: ``python -m lora_func show FILE``, ``convert``, ``diff``, ``variants``."""

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

import lora_func as lf
from lora_func.adapter import end_of_path, size_of
from lora_func.costs import cost_of
from lora_func.files import TRAINING_STATE, adapters_of, byte_view, kind_of, read
from lora_func.peft import from_peft, read_config, read_tensors, to_peft
from lora_func.variants import all_variants

CONVERTED = "adapter.safetensors"
"""The file in a folder that ``convert --to lora`` writes."""


def show(options: argparse.Namespace) -> int:
    """Print the leaves of a file, its metadata, and whether the numbers are healthy."""
    console = Console(width=max(80, Console().width))
    path = options.file
    if path.is_dir() and not (path / CONVERTED).is_file():
        return _show_peft(options, console)
    path = path / CONVERTED if path.is_dir() else path
    kind = kind_of(path)
    content = read(path, kind)
    adapters: dict[str, Mapping[str, torch.Tensor]] = {"": content.tensors}
    if kind == TRAINING_STATE:
        adapters = {**adapters_of(content)}
    for name, params in adapters.items():
        if name:
            console.print(f"adapter {name} of {len(adapters)}", highlight=False)
        console.print(lf.summary(params))
        _print_size(params, console)
    hidden = ("adapters", "optimizer", "python") if kind == TRAINING_STATE else ()
    for name, value in {**content.facts, **content.metadata}.items():
        if name == "base" and value is not None:
            value = f"{len(value)} weights known by shape, dtype and values"
        if name not in hidden:
            console.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)
    _print_health(content.tensors, console)
    return 0


def _show_peft(options: argparse.Namespace, console: Console) -> int:
    config = read_config(options.file)
    tensors = read_tensors(options.file, allow_nonfinite=True)
    if options.model is not None:
        console.print(lf.summary(from_peft(options.file, _model(options), allow_nonfinite=True)))
    else:
        table = Table("tensor", "shape", "dtype", box=box.SIMPLE)
        for name, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            table.add_row(end_of_path(name), str(tuple(tensor.shape)), dtype)
        console.print(table)
    for name, value in config.items():
        if value not in (None, False, [], {}):
            console.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)
    _print_health(tensors, console)
    return 0


def _print_size(params: Mapping[str, torch.Tensor], console: Console) -> None:
    try:
        console.print(f"a stack of {size_of(params)} adapters", highlight=False)
    except ValueError:
        console.print("one adapter", highlight=False)


def _print_health(tensors: Mapping[str, torch.Tensor], console: Console) -> None:
    trained = {k: t for k, t in tensors.items() if not k.rpartition(".")[2].startswith("_")}
    health = {
        "not finite": [key for key, leaf in tensors.items() if not leaf.isfinite().all()],
        "all zero": [key for key, leaf in trained.items() if not leaf.any()],
    }
    for name, keys in health.items():
        found = f"{len(keys)} of {len(tensors)} leaves, such as {keys[0]}" if keys else "none"
        console.print(f"{name}: {found}", highlight=False, markup=False, soft_wrap=True)


def _model(options: argparse.Namespace) -> torch.nn.Module:
    """The base, from a class of transformers or of an imported module."""
    where, _, name = options.model_class.rpartition(".")
    kind: Any = getattr(importlib.import_module(where or "transformers"), name)
    settings = dict(_setting(text) for text in options.config)
    model: torch.nn.Module = kind.from_pretrained(options.model, **settings)
    return model


def _setting(text: str) -> tuple[str, Any]:
    key, found, value = text.partition("=")
    if not found or not key:
        raise ValueError(f"--config: got {text!r}, expected key=value, such as num_labels=3")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def convert(options: argparse.Namespace) -> int:
    """Write an adapter as a checkpoint of PEFT, or as a LoRA."""
    model = _model(options)
    if options.file.is_dir():
        params = from_peft(options.file, model)
    else:
        params = lf.load(options.file, model=model)
    if options.to == "peft":
        to_peft(params, options.out, model=model, base_model_name=options.model)
    else:
        found = lf.to_lora(params, model, options.rank, tol=options.tol)
        options.out.mkdir(parents=True, exist_ok=True)
        lf.save(found.params, options.out / CONVERTED, model=model)
        worst = max(found.errors.values(), default=0.0)
        print(f"largest relative error of a site: {worst:.2e}")
    print(options.out)
    return 0


def diff(options: argparse.Namespace) -> int:
    """Print where two adapters differ; the status is 1 if they do."""
    one, two = (lf.load(path) for path in (options.file, options.other))
    table = Table(box=box.SIMPLE)
    for column in ("leaf", "largest difference", "relative"):
        table.add_column(column, justify="left" if column == "leaf" else "right")
    for key in {**one, **two}:
        a, b = one.get(key), two.get(key)
        if a is None or b is None:
            where = options.file if b is None else options.other
            table.add_row(escape(key), escape(f"only in {where}"), "")
        elif (a.shape, a.dtype) != (b.shape, b.dtype):
            kinds = [f"{leaf.dtype} {tuple(leaf.shape)}" for leaf in (a, b)]
            table.add_row(escape(key), ", ".join(kinds), "")
        elif not torch.equal(byte_view(a.detach()), byte_view(b.detach())):
            off, size = (a.double() - b.double()).detach(), b.detach().double().norm()
            relative = f"{(off.norm() / size).item():.2e}" if size else "–"
            table.add_row(escape(key), f"{off.abs().max().item():.2e}", relative)
    if not table.row_count:
        print(f"{len(one)} leaves are the same")
        return 0
    Console(width=max(100, Console().width)).print(table)
    return 1


def variants(options: argparse.Namespace) -> int:
    """Print what each variant costs on one square layer."""
    table = Table(title=f"one layer {options.width} x {options.width}", box=box.SIMPLE)
    columns = ("trained", "products per token", "per call", "constants", "start, s")
    for column in ("variant", "family", *columns):
        is_text = column in {"variant", "family"}
        table.add_column(column, justify="left" if is_text else "right", no_wrap=is_text)
    listed = sorted(all_variants(), key=lambda variant: variant.family or "")
    rows = [(v, name, trial) for v in listed for name, trial in v.trials.items()]
    for variant, name, trial in tqdm(rows, disable=None, leave=False):
        try:
            trained, products, fixed, constants, seconds = cost_of(
                variant, trial, options.width, options.rank
            )
        except ValueError as error:
            table.add_row(name, variant.family, escape(str(error)))
            continue
        numbers = (f"{trained:,}", f"{products:,.0f}", f"{fixed:,}", f"{constants:,}")
        table.add_row(name, variant.family, *numbers, f"{seconds:.3f}")
    Console(width=max(100, Console().width)).print(table)
    return 0


def _add_base(added: argparse.ArgumentParser, required: bool) -> None:
    name = "AutoModelForCausalLM"
    added.add_argument("--model", required=required, help="the base: folder, or hub name")
    added.add_argument("--model-class", default=name, help="of transformers, or package.Class")
    added.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the base, such as num_labels=3; may be repeated",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lora_func", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: object, help: str, reads: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__, help=help, description=help)  # type: ignore[attr-defined]
        if reads:
            added.add_argument("file", type=Path)
        added.add_argument(
            "--import",
            dest="imports",
            action="append",
            default=[],
            metavar="PACKAGE",
            help="a package that registers variants or models; may be repeated",
        )
        added.set_defaults(run=run)
        return added

    shown = "the leaves of a file or a folder of PEFT, its metadata, and the health of its numbers"
    _add_base(command(show, shown), required=False)
    to = command(convert, "write an adapter in another form")
    _add_base(to, required=True)
    to.add_argument("--to", choices=("peft", "lora"), required=True)
    to.add_argument("--out", type=Path, required=True, help="a folder")
    to.add_argument("--rank", type=int, default=16, help="of the LoRA")
    to.add_argument("--tol", type=float, default=1e-3, help="the largest relative error of a site")
    command(diff, "where two adapters differ; the status is 1 if they do").add_argument(
        "other", type=Path
    )
    costs = command(variants, "what each variant costs on one square layer", reads=False)
    costs.add_argument("--width", type=int, default=768)
    costs.add_argument("--rank", type=int, default=16)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. An error prints one line, and the exit status is 2."""
    options = _parser().parse_args(arguments)
    try:
        for package in options.imports:
            importlib.import_module(package)
        status: int = options.run(options)
    except Exception as error:  # transformers raises errors of any kind
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        print(f"lora_func: {' '.join(text.split())}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
