"""Two ranks on one machine: a sweep split over them, a sharded base, and data parallelism.

    python -m nox -s bench -- devices

Each figure is the median of steps on ranks with one thread each; the sides are those of the page
"more than one device". One rank alone has one thread too.
"""

import json
import os
import subprocess
import sys

import torch
import torch.distributed as dist
from measuring import Row, alternately, parser_of, qwen3, report, tokens, training_step
from torch.distributed.fsdp import fully_shard

import lora_func as lf
from lora_func.distributed import synced


def sharded(options):
    base = qwen3(options.width, options.layers)
    for layer in base.model.layers:
        fully_shard(layer)
    return fully_shard(base)


def stack_of(model, adapters: int) -> lf.Params:
    trained, constants = lf.partition(lf.stack([lf.init(model, lf.LoRA(r=8))] * adapters))
    return {key: leaf.detach().requires_grad_() for key, leaf in trained.items()} | constants


def sweep(model, adapters: int, batch):
    stack = stack_of(model, adapters)
    lf.vcall(model, stack, batch)  # checks that the model keeps rows apart
    return training_step(stack, lambda: lf.vcall(model, stack, batch).sum())


def measure(options) -> Row:
    """The seconds of each way on this rank; with one rank those of the whole alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    plain, batch = qwen3(options.width, options.layers), tokens(1, options.tokens)
    wide = tokens(options.adapters // ranks, options.tokens)
    params = lf.init(plain, lf.LoRA(r=8))
    share = options.adapters // ranks
    ways = {
        "sweep": sweep(plain, share, batch),
        "one adapter": training_step(params, lambda: lf.fcall(plain, synced(params), wide)),
    }
    if ranks > 1:
        spread = sharded(options)
        own = sum(p.to_local().numel() for p in spread.parameters())
        held = own / sum(p.numel() for p in plain.parameters())
        ways["sweep, sharded base"] = sweep(spread, share, batch)
    seconds = alternately(ways, options.repeats)
    return seconds | ({"held": held} if ranks > 1 else {})


def on_ranks(ranks: int) -> Row:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", __file__, *sys.argv[1:], "--only", "true"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=settings)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(line)


def main() -> None:
    parser = parser_of(__doc__, width=256, layers=4, tokens=64, adapters=8, repeats=9)
    options = parser.parse_args()
    if options.only:
        found = measure(options)
        if dist.get_rank() == 0:
            print(json.dumps(found))
        dist.destroy_process_group()
        return
    one, two = on_ranks(1), on_ranks(2)
    rows = [
        {"way": way, "ms": 1e3 * two[way], "one rank / two": one[way.split(",")[0]] / two[way]}
        for way in two
        if way != "held"
    ]
    rows[-1]["share of the base"] = two["held"]
    report("devices", rows, ["one rank / two"], options)


if __name__ == "__main__":
    main()
