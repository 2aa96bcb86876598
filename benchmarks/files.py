"""Saving and loading an adapter, compared with plain safetensors.

    python -m nox -s bench -- files

``save`` writes the file, reads it back, compares it bit for bit, and then replaces the older file.
``load`` checks the checksum of every tensor. safetensors does neither.
"""

import tempfile
from pathlib import Path

import torch
from measuring import alternately, parser_of, report
from safetensors.torch import load_file, save_file

import lora_func as lf


def main() -> None:
    options = parser_of(__doc__, MiB=200, repeats=5).parse_args()
    width = 4096
    ranks = options.MiB * 2**20 // (4 * 2 * width * 16)
    params = {}
    for i in range(16):
        params[f"layers.{i}.lora.A"] = torch.randn(ranks, width, requires_grad=True)
        params[f"layers.{i}.lora.B"] = torch.randn(width, ranks, requires_grad=True)
        params[f"layers.{i}.lora._scale"] = torch.tensor(2.0, dtype=torch.float64)
    plain = {key: leaf.detach() for key, leaf in params.items()}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours.safetensors", Path(folder) / "theirs.safetensors"
        seconds = alternately(
            {
                "save": lambda: lf.save(params, ours),
                "save alone": lambda: save_file(plain, theirs),
                "load": lambda: lf.load(ours),
                "load alone": lambda: {k: t.clone() for k, t in load_file(theirs).items()},
            },
            options.repeats,
        )
    rows = [
        {
            "what": f"{what} {options.MiB} MiB",
            "ours s": seconds[what],
            "safetensors s": seconds[f"{what} alone"],
            "ratio": seconds[what] / seconds[f"{what} alone"],
        }
        for what in ("save", "load")
    ]
    report("files", rows, ["ratio"], options)


if __name__ == "__main__":
    main()
