"""Run all benchmarks in sequence, each in its own process.

    python -m nox -s bench

Every benchmark prints a table and writes JSON and a plot to benchmarks/results. All tables are
printed again at the end.
"""

import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).parent
PLAN = [
    ["steps"],
    ["steps", "--width", "1024", "--rows", "1", "--tokens", "512", "--repeats", "7"],
    ["steps", "--compiled", "1"],
    ["sweeps"],
    ["sweeps", "--width", "768", "--sizes", "32x8", "8x16", "8x128", "4x1024"],
    ["memory"],
    ["launches"],
    ["layers"],
    ["starts"],
    ["overhead"],
    ["files"],
    ["devices"],
    ["checkpointing"],
    ["quantised"],
]


def main() -> None:
    tables = []
    for name, *arguments in tqdm(PLAN, unit="benchmark"):
        command = [sys.executable, str(HERE / f"{name}.py"), *arguments, *sys.argv[1:]]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        tables.append(done.stdout)
    print(*tables, sep="\n")


if __name__ == "__main__":
    main()
