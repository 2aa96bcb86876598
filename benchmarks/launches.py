"""How many kernels a training step launches for each adapted layer, beyond the frozen model's.

    python -m nox -s bench -- launches
    python -m nox -s bench -- launches --variants lora dora

A GPU waits for launches where a model is small, or a batch. A count has no noise, and is the same
on a CPU; what only looks at memory (views) does not count. The model is Qwen3-shaped, in bfloat16,
with adapters on its seven linear projections. ``vcall`` runs two adapters.
"""

import collections
from collections.abc import Callable, Mapping
from typing import Any

from measuring import (
    PROJECTIONS,
    Row,
    floor_step,
    parser_of,
    qwen3,
    report,
    tokens,
    trained_stack,
    training_step,
    trials,
    with_peft,
)
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import lora_func as lf

TRIALS = trials()
VIEWS = {
    *("_unsafe_view", "alias", "as_strided", "detach", "expand", "narrow", "permute", "select"),
    *("slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten"),
    *("unsqueeze", "view", "view_as_complex", "view_as_real"),
}
NO_KERNELS = ("sym_", "prim", "promote_types", "is_", "_reshape_alias")


class Launches(TorchDispatchMode):
    """Counts operations that write memory, by their name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS and not name.startswith(NO_KERNELS):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def launches_of(step: Callable[[], None]) -> int:
    """Count the kernels of a step that ran before."""
    step()
    with Launches() as counted:
        step()
    return counted.found.total()


def per_site(name: str, layers: int, with_others: bool = True) -> Row:
    """The kernels of a step for each site: ours, of a sweep, and PEFT's.

    Args:
        name: The trial.
        layers: The layers of the model, each with seven sites.
        with_others: Whether PEFT's are counted.

    Returns:
        A row for the report.
    """
    model, batch = qwen3(128, layers).bfloat16(), tokens(2, 8)
    trial = TRIALS[name]
    params, stack = trial.init(model, "cpu"), trained_stack(model, trial, 2, "cpu")
    lf.vcall(model, stack, batch)  # the first one also runs each adapter alone as a check
    steps = {
        "ours": training_step(params, lambda: lf.fcall(model, params, batch)),
        "vcall": training_step(stack, lambda: lf.vcall(model, stack, batch).sum()),
    }
    if with_others and trial.peft is not None:
        other = with_peft(qwen3(128, layers).bfloat16(), trial.peft())
        leaves = dict(other.named_parameters())
        steps["PEFT"] = training_step(leaves, lambda: other(**batch).loss)
    floor = launches_of(floor_step(model, batch))
    sites = layers * len(PROJECTIONS)
    return {"variant": name} | {
        side: (launches_of(step) - floor) / sites for side, step in steps.items()
    }


def main() -> None:
    parser = parser_of(__doc__, layers=12, variants=[*TRIALS])
    options = parser.parse_args()
    rows = [per_site(name, options.layers) for name in tqdm(options.variants, unit="variant")]
    report("launches", rows, ["ours", "vcall", "PEFT"], options)


if __name__ == "__main__":
    main()
