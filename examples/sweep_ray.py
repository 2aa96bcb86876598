"""A grid of adapters over Ray's workers, which goes on when a worker dies.

    python examples/sweep_ray.py
    python examples/sweep_ray.py --kill       # one worker dies in the middle of its trial

A trial is a *stack* of members, not a single adapter: a worker trains it in one ``vcall`` for each
step. Ray starts a trial again if its worker dies; it then goes on from the members' files. On a
cluster the folder of these files is one that all machines see. Wants ``lora_func[ray]``.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import ray
from sweep_ranks import grid, grid_parser, report, train
from tasks import classify

import lora_func as lf


@ray.remote(num_cpus=1, max_retries=2)
def trial(indices: Sequence[int], options) -> list[lf.Params]:
    """Train some members of the grid; return their adapters, without gradients."""
    task = classify(options)
    task.model.requires_grad_(False)
    members = [grid(options)[index] for index in indices]
    for member in members:
        member.start(task)
    died_before = options.folder / "died"
    if options.kill and 0 in indices and not died_before.exists():
        died_before.touch()
        options.stop_after = 2
        train(task, members, options, quiet=True)
        os._exit(1)  # what a machine does that is taken away
    train(task, members, options, quiet=True)
    return [{key: leaf.detach() for key, leaf in member.params.items()} for member in members]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the grid; return the exit status."""
    parser = grid_parser(__doc__, "sweep_ray")
    parser.add_argument("--workers", type=int, default=2, help="trials at a time")
    parser.add_argument("--kill", action="store_true", help="let one worker die")
    options = parser.parse_args(arguments)
    options.stop_after, options.folder = None, options.folder.resolve()
    members = grid(options)
    shares = [range(first, len(members), options.workers) for first in range(options.workers)]
    here = str(Path(__file__).parent)
    ray.init(
        num_cpus=options.workers,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([here, *sys.path])}},
    )
    try:
        found = ray.get([trial.remote([*share], options) for share in shares])
    finally:
        ray.shutdown()
    for share, adapters in zip(shares, found, strict=True):
        for index, params in zip(share, adapters, strict=True):
            members[index].params = params
    if options.kill:
        print("one worker died, and another one went on from the members' files")
    report(classify(options), members, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
