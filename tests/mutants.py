"""Mutation score: break the code on purpose, one place at a time, and see whether a test fails.

    python tests/mutants.py                        # 8 mutants of each file, an hour on two cores
    python tests/mutants.py variants/hra --sample 0  # all mutants of one file

cosmic-ray makes the mutants, in copies of the project. Prints a table of the scores, and writes the
survivors to ``mutants.txt``: each is a test that is missing, or code that changes nothing.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
TESTS = {
    "numerics": "tests/test_linalg.py tests/test_products.py tests/test_entries.py "
    "tests/test_dropout.py tests/test_algebra.py tests/test_calibrate.py tests/variants",
    "variants": "tests/variants tests/test_laws.py tests/test_peft.py tests/test_peft_layers.py "
    "tests/test_configs.py tests/test_products.py tests/test_algebra.py tests/test_dropout.py "
    "tests/test_variants.py -k '{stem} or algebra or dropout'",
    "sweep": "tests/test_sweep.py tests/stateful/test_sweep_life.py",
}
"""Package -> the arguments of pytest for one of its files."""

KEYWORDS = {"low_rank": "lora or pissa or eva", "init": "variant"}
"""Part of a file's name -> what stands in the names of its tests, if that differs."""

SECONDS = 900
"""After which a mutant counts as killed: a loop that does not end."""


class Mutant(NamedTuple):
    """A mutant, by the file that it changes."""

    file: Path
    specification: MutationSpec


class Verdict(NamedTuple):
    """What became of a mutant."""

    file: Path
    survived: bool
    diff: str


def without_effect(file: Path) -> set[int]:
    """The lines of type annotations, and of the settings with which examples try a variant."""
    nodes = [*ast.walk(ast.parse(file.read_text()))]
    found = [getattr(n, "annotation", None) or getattr(n, "returns", None) for n in nodes]
    found += [n.value for n in nodes if isinstance(n, ast.keyword) and n.arg == "trials"]
    return {line for a in found if a for line in range(a.lineno, (a.end_lineno or a.lineno) + 1)}


def mutants(file: Path, sample: int) -> Iterator[Mutant]:
    """Mutants of a file, at most one on a line if they are a sample."""
    with use_db(":memory:", WorkDB.Mode.create) as database:
        init([file], database, {})
        found = [item.mutations[0] for item in database.work_items]
    skipped = without_effect(file)
    found = [one for one in found if one.start_pos[0] not in skipped]
    random.Random(str(file)).shuffle(found)
    if sample:
        found = [*{one.start_pos[0]: one for one in found}.values()][:sample]
    yield from (Mutant(file, one) for one in found)


def enter_copy(folder: str) -> None:
    """Give a process a copy of the project of its own."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    own = Path(folder, str(os.getpid()))
    for name in files.splitlines():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, own / name)
    os.chdir(own)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(own), "PYTHONDONTWRITEBYTECODE": "1"}


def tried(mutant: Mutant) -> Verdict:
    """Run the tests on a mutant."""
    file = mutant.file
    stem = file.stem.strip("_")
    chosen = TESTS[file.parent.name].format(stem=KEYWORDS.get(stem, stem))
    command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider {chosen}"
    result = mutate_and_test([mutant.specification], command, SECONDS)
    return Verdict(file, not result.is_killed, result.diff or "")


def report(verdicts: list[Verdict]) -> None:
    """Print the scores and write the survivors."""
    table = Table(title="Mutants")
    for column in ("file", "mutants", "killed", "score"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for file in [*sorted({v.file for v in verdicts}), None]:
        here = [v for v in verdicts if file in {v.file, None}]
        killed = sum(not v.survived for v in here)
        score = f"{100 * killed / len(here):.0f} %"
        table.add_row(str(file or "all"), str(len(here)), str(killed), score)
    Console().print(table)
    survivors = [v.diff for v in verdicts if v.survived]
    (ROOT / "mutants.txt").write_text("\n\n".join(survivors) + "\n")
    print(f"{len(survivors)} survivors: mutants.txt")


def main() -> None:
    """Try mutants of the files that are named, or of all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", help="such as variants/hra; all by default")
    parser.add_argument("--sample", type=int, default=8, help="mutants of each file; 0 for all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    os.chdir(ROOT)
    named = [Path("lora_func", f"{name}.py") for name in args.files]
    files = named or [
        f for package in TESTS for f in sorted(Path("lora_func", package).glob("*.py"))
    ]
    chosen = [mutant for file in files for mutant in mutants(file, args.sample)]
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(args.jobs, initializer=enter_copy, initargs=[folder]) as pool:
            report([*tqdm(pool.map(tried, chosen), total=len(chosen), desc="mutants")])


if __name__ == "__main__":
    main()
