"""Every benchmark runs and writes its JSON and plot; the measured values are not checked."""

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SMALL = ["--width", "128", "--layers", "1"]
RUNS = {
    "steps": [*SMALL, "--rows", "1", "--tokens", "4", "--repeats", "1"],
    "sweeps": [*SMALL, "--sizes", "2x4", "--repeats", "1"],
    "memory": [*SMALL, "--tokens", "256", "--variants", "lora", "--adapters", "1"],
    "launches": ["--layers", "1", "--variants", "lora"],
    "layers": ["--width", "64", "--vocabulary", "100", "--repeats", "1"],
    "starts": ["--widths", "64", "--repeats", "1"],
    "overhead": ["--sites", "2", "--repeats", "1", "--imports", "1"],
    "gpu": ["--toy", "1", "--repeats", "1", "--parts", "steps", "sweeps", "--methods", "lora"],
    "devices": [*SMALL, "--tokens", "4", "--adapters", "2", "--repeats", "1"],
    "files": ["--MiB", "8", "--repeats", "1"],
}


@pytest.mark.filterwarnings("ignore")  # warnings from PEFT
@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    arguments = [*RUNS[name], "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    importlib.import_module(name).main()
    assert capsys.readouterr().out
    for written in tmp_path.glob("*.json"):
        found = json.loads(written.read_text())
        assert found["machine"]["torch"]
        parts = found.get("parts", {"": found.get("rows")})
        rows = [row for of_part in parts.values() for row in of_part]
        assert rows
        assert not any("error" in row for row in rows)
        assert "parts" in found or written.with_suffix(".png").stat().st_size
    assert [*tmp_path.glob("*.json")]


def test_the_plan_names_every_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    planned = {name for name, *_ in importlib.import_module("run").PLAN}
    assert planned == {file.stem for file in FOLDER.glob("*.py")} - {"measuring", "run", "gpu"}
