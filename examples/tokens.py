"""New tokens for an old model: a byte-level Qwen3 learns words of Python, in their rows alone.

    python examples/tokens.py
    python examples/tokens.py --words 60

A tiny Qwen3 reads docstrings byte by byte. The vocabulary then grows by the most frequent words of
code, each of which was several bytes. ``TrainableTokens`` trains the rows of the new tokens, in the
embedding and in the head that is tied to it; nothing else changes, and nothing of the size of the
table is kept. Three ways are compared in one sweep: rows, a LoRA, and both. Bits for each byte of
text can be compared between the two vocabularies.
"""

import re
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from math import log
from pathlib import Path

import matplotlib
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tasks import Batch, byte_batches, code, docstrings, in_epochs, parser_of, smoothed
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

import lora_func as lf

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from plots import finish

PAD, BYTES = 256, 257


def base_model(options: Namespace) -> Qwen3ForCausalLM:
    """A tiny model with a tied head, trained on docstrings and frozen."""
    rows, _ = docstrings(options.packages, options.most, options.seed)
    data = byte_batches([text for text, _ in rows], options.batch_size, options.length)
    torch.manual_seed(options.seed)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=BYTES, use_cache=False, **sizes, **heads))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for batch in tqdm(in_epochs(data, options.epochs, options.seed), "docstrings", unit="step"):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def frequent_words(texts: Sequence[str], count: int) -> list[str]:
    """The words whose tokens save the most bytes."""
    found = Counter(word for text in texts for word in re.findall(r"\w{3,}| {4,}", text))
    return sorted(found, key=lambda word: -(len(word) - 1) * found[word])[:count]


def encoded(texts: Sequence[str], words: Sequence[str], options: Namespace) -> list[Batch]:
    """Batches in which a frequent word is one token."""
    ids = {word: BYTES + i for i, word in enumerate(words)}
    pattern = re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")
    made = []
    for start in range(0, len(texts), options.batch_size):
        rows = []
        for text in texts[start : start + options.batch_size]:
            row, end = [], 0
            for match in pattern.finditer(text):
                row += [*text[end : match.start()].encode(), ids[match[0]]]
                end = match.end()
            rows.append([*row, *text[end:].encode()][: options.length])
        padded = torch.tensor([row + [PAD] * (options.length - len(row)) for row in rows])
        mask = (padded != PAD).long()
        labels = padded.masked_fill(mask == 0, -100)
        made.append({"input_ids": padded, "attention_mask": mask, "labels": labels})
    return made


def grown(model: Qwen3ForCausalLM, words: Sequence[str]) -> None:
    """Add a token for each word, which starts as the mean of its bytes."""
    table = model.get_input_embeddings().weight
    rows = torch.stack([table[[*word.encode()]].mean(0) for word in words])
    model.resize_token_embeddings(BYTES + len(words), mean_resizing=False)
    model.get_input_embeddings().weight.data[BYTES:] = rows
    model.requires_grad_(False)


def bits_per_byte(losses: Tensor, batch: Batch, words: Sequence[str]) -> Tensor:
    """From the mean loss of a token to bits for each byte of text."""
    labels = batch["labels"][:, 1:]
    lengths = torch.tensor([1] * BYTES + [len(word.encode()) for word in words])
    targets = labels[labels != -100]
    return losses * len(targets) / lengths[targets].sum() / log(2)


def held_out(
    model: Qwen3ForCausalLM, members: Sequence[lf.Params], data: Sequence[Batch], words: list[str]
) -> list[float]:
    """Bits per byte of each member; of the model alone if there is none."""

    def losses(batch: Batch) -> Tensor:
        return lf.vcall(model, members, batch) if members else model(**batch).loss[None]

    with torch.no_grad():
        found = [bits_per_byte(losses(batch), batch, words) for batch in data]
    return torch.stack(found).mean(0).tolist()


def train(
    model: Qwen3ForCausalLM,
    members: dict[str, lf.Params],
    data: Sequence[Batch],
    words: list[str],
    options: Namespace,
) -> Tensor:
    """Train all members in place, in one call a step; return bits per byte, (steps, members)."""
    leaves = [lf.partition(member)[0].values() for member in members.values()]
    optimizer = torch.optim.AdamW([leaf for own in leaves for leaf in own], lr=options.lr)
    curves = []
    with tqdm(in_epochs(data, options.epochs, options.seed), "words", unit="step") as bar:
        for batch in bar:
            optimizer.zero_grad()
            losses = lf.vcall(model, [*members.values()], batch)
            losses.sum().backward()
            optimizer.step()
            curves.append(bits_per_byte(losses.detach(), batch, words))
            bar.set_postfix(bits=f"{curves[-1].min().item():.2f}")
    return torch.stack(curves)


def plot(names: Sequence[str], curves: Tensor, before: float, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, curve, style in zip(names, curves.T.tolist(), ("-", "--", ":"), strict=True):
        axes.plot(smoothed(curve), ls=style, color="black", label=name)
    axes.axhline(before, color="0.6", label="bytes alone, no adapter")
    axes.set(xlabel="step", ylabel="bits per byte (mean of ten steps)", title="words as new tokens")
    axes.legend()
    finish(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the ways; return the exit status."""
    small = {"epochs": 2, "packages": 6, "most": 80, "length": 96, "batch_size": 16}
    parser = parser_of(__doc__, "tokens.png", **small)
    parser.add_argument("--words", type=int, default=40, help="new tokens")
    parser.add_argument("--lr", type=float, default=5e-3)
    options = parser.parse_args(arguments)

    model, texts = base_model(options), code(options.packages * options.most, options.seed)
    fifth = len(texts) // 5
    before = held_out(model, [], encoded(texts[:fifth], [], options), [])[0]
    words = frequent_words(texts[fifth:], options.words)
    print(f"{len(words)} new tokens: {', '.join(repr(word) for word in words[:12])} ...")
    grown(model, words)
    ids = [*range(BYTES, BYTES + len(words))]
    both = ["embed_tokens", "lm_head"]
    rows = lf.TrainableTokens(token_ids=ids, target_modules=both, tied=True)
    ways = {"rows": [rows], "LoRA": [lf.LoRA(r=4)], "rows and LoRA": [rows, lf.LoRA(r=4)]}
    members = {name: lf.init(model, cfg, seed=options.seed) for name, cfg in ways.items()}
    data = encoded(texts[fifth:], words, options), encoded(texts[:fifth], words, options)
    start = held_out(model, [*members.values()], data[1], words)
    curves = train(model, members, data[0], words, options)
    end = held_out(model, [*members.values()], data[1], words)

    shown = Table(title="bits per byte of held-out code", box=box.SIMPLE)
    for column in ("trained", "numbers", "start", "end"):
        shown.add_column(column, justify="left" if column == "trained" else "right")
    shown.add_row("nothing, bytes alone", "0", f"{before:.2f}", f"{before:.2f}")
    for (name, member), a, b in zip(members.items(), start, end, strict=True):
        numbers = sum(leaf.numel() for leaf in lf.partition(member)[0].values())
        shown.add_row(name, f"{numbers:,}", f"{a:.2f}", f"{b:.2f}")
    Console(width=max(100, Console().width)).print(shown)
    plot([*members], curves, before, options.plot)
    print(f"curves: {options.plot.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
