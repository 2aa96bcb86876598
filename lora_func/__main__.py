"""The command line: ``python -m lora_func show FILE``, ``convert``, ``diff``."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import lora_func as lf
from lora_func.files import byte_view, read_adapter
from lora_func.peft import to_peft


def show(options: argparse.Namespace) -> int:
    """Print the leaves of a file, its metadata, and whether the numbers are healthy."""
    content = read_adapter(options.file)
    params = content.tensors
    console = Console(width=max(100, Console().width))
    console.print(lf.summary(params))
    said = {**content.facts, **content.metadata}
    for name, value in said.items():
        if name == "base" and value is not None:
            value = f"{len(value)} weights known by shape, dtype and values"
        console.print(f"{name}: {value}", highlight=False, markup=False)
    trained, _ = lf.partition(params)
    health = {
        "not finite": [key for key, leaf in params.items() if not leaf.isfinite().all()],
        "all zero": [key for key, leaf in trained.items() if not leaf.any()],
    }
    for name, keys in health.items():
        found = f"{len(keys)} of {len(params)} leaves, such as {keys[0]}" if keys else "none"
        console.print(f"{name}: {found}", highlight=False, markup=False)
    return 0


def convert(options: argparse.Namespace) -> int:
    """Write an adapter as a checkpoint of PEFT, or as a LoRA."""
    import transformers

    model = getattr(transformers, options.model_class).from_pretrained(options.model)
    params = lf.load(options.file, model=model)
    if options.to == "peft":
        to_peft(params, options.out, model=model, base_model_name=options.model)
    else:
        found = lf.to_lora(params, model, options.rank, tol=options.tol)
        options.out.mkdir(parents=True, exist_ok=True)
        lf.save(found.params, options.out / "adapter.safetensors", model=model)
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. An error prints one line, and the exit status is 2."""
    parser = argparse.ArgumentParser(prog="lora_func", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: object, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__, help=help, description=help)  # type: ignore[attr-defined]
        added.add_argument("file", type=Path)
        added.add_argument(
            "--import",
            dest="imports",
            action="append",
            default=[],
            metavar="PACKAGE",
            help="a package that registers variants; may be repeated",
        )
        added.set_defaults(run=run)
        return added

    command(show, "the leaves of a file, its metadata, and whether the numbers are healthy")
    to = command(convert, "write an adapter in another form")
    to.add_argument("--to", choices=("peft", "lora"), required=True)
    to.add_argument("--out", type=Path, required=True, help="a folder")
    to.add_argument("--model", required=True, help="the base: folder, or name on the hub")
    to.add_argument("--model-class", default="AutoModelForCausalLM", help="of transformers")
    to.add_argument("--rank", type=int, default=16, help="of the LoRA")
    to.add_argument("--tol", type=float, default=1e-3, help="the largest relative error of a site")
    command(diff, "where two adapters differ; the status is 1 if they do").add_argument(
        "other", type=Path
    )
    options = parser.parse_args(arguments)
    try:
        for package in options.imports:
            importlib.import_module(package)
        status: int = options.run(options)
    except (ImportError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        print(f"lora_func: {' '.join(text.split())}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
