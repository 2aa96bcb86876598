"""What two processes do together: ``torchrun ... tests/distributed/ranks.py FILE OUT``.

Each function of the file whose name starts with ``case_`` runs on both ranks. OUT gets the errors
by the functions' names. A case on which the ranks wait for each other too long ends the run.
"""

import importlib
import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE = 40
"""Seconds after which a rank that waits for another one gives up."""


def cases_of(file):
    """The cases of a file, by name."""
    module = importlib.import_module(f"tests.distributed.{file}")
    return {n.removeprefix("case_"): f for n, f in vars(module).items() if n.startswith("case_")}


def main(file, out):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    found = {}
    for name, case in cases_of(file).items():
        torch.manual_seed(0)
        try:
            case()
            mine = ""
        except Exception:
            mine = f"rank {dist.get_rank()}: {traceback.format_exc()}"
        errors = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(errors, mine)
        except Exception:
            errors = [mine or "the other rank does not answer: the ranks hang"]
        found[name] = "\n".join(filter(None, errors))
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(found))
        if "hang" in found[name]:
            break
    os._exit(0)  # a rank that hangs would keep the other one


if __name__ == "__main__":
    main(*sys.argv[1:])
