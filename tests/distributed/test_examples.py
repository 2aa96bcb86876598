"""The examples for several ranks, in a small mode, with two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_func as lf

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SMALL = ["--packages", "3", "--most", "16", "--length", "12", "--batch-size", "8", "--epochs", "1"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(folder, ranks, example, *arguments):
    command = [
        sys.executable,
        *(TORCHRUN if ranks > 1 else []),
        str(EXAMPLES / example),
        *arguments,
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def same_members(path):
    for i in range(4):
        whole, killed = (
            lf.load_training_state(path / folder / f"member-{i}.safetensors")
            for folder in ("whole", "killed")
        )
        assert whole.extra == killed.extra
        assert all(torch.equal(leaf, killed.params[key]) for key, leaf in whole.params.items())


@pytest.mark.parametrize("sharded", [[], ["--sharded"]], ids=["replicated", "sharded"])
def test_data_parallel(tiny, tmp_path, sharded):
    shown = run(tmp_path, 2, "data_parallel.py", "--model", str(tiny), *SMALL, *sharded)
    (row,) = [line.split() for line in shown.splitlines() if line.strip().endswith(" 0")]
    assert row[:2] == ["2", "sharded" if sharded else "replicated"]
    assert (tmp_path / "data_parallel.png").stat().st_size > 10_000


def test_a_sweep_over_ranks_goes_on_with_another_number_of_ranks(tiny, tmp_path):
    settings = ["--model", str(tiny), *SMALL, "--lrs", "1e-3", "1e-2", "--keep", "1"]
    run(tmp_path, 1, "sweep_ranks.py", *settings, "--folder", "whole")
    run(tmp_path, 2, "sweep_ranks.py", *settings, "--folder", "killed", "--stop-after", "2")
    shown = run(tmp_path, 1, "sweep_ranks.py", *settings, "--folder", "killed")
    assert shown.count("%") == 4
    same_members(tmp_path)


@pytest.mark.slow
def test_a_sweep_over_rays_workers_goes_on_when_one_dies(tiny, tmp_path):
    pytest.importorskip("ray")
    settings = ["--model", str(tiny), *SMALL, "--lrs", "1e-3", "1e-2", "--keep", "1"]
    run(tmp_path, 1, "sweep_ranks.py", *settings, "--folder", "whole")
    shown = run(tmp_path, 1, "sweep_ray.py", *settings, "--folder", "killed", "--kill")
    assert "one worker died" in shown
    assert shown.count("%") == 4
    same_members(tmp_path)
