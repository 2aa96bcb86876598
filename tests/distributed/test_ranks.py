"""Two processes on one machine: each case runs on both, and is compared with one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import cases_of

HERE = Path(__file__).parent
FILES = ("sharded", "parallel", "sweeps", "wrapped")
LIMIT = 300
"""Seconds after which a file's run is stopped; a hang is a failure."""


@pytest.fixture(scope="module", params=FILES)
def run(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(HERE / "ranks.py"), request.param, str(out)],
        cwd=HERE.parent.parent,
        env={**os.environ, "PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert out.exists(), done.stderr[-3000:]
    return request.param, json.loads(out.read_text())


def test_what_two_ranks_do(run, subtests):
    file, found = run
    for name in cases_of(file):
        with subtests.test(msg=name):
            assert name in found, "a case before it hung"
            assert not found[name], found[name]
