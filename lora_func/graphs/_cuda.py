"""What the capture asks of CUDA: a device, a stream beside the current one, and the graph."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

GPU = "cuda"


def current_device() -> torch.device:
    """Return the current GPU.

    Raises:
        RuntimeError: If there is none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("capture: there is no GPU; call the function itself")
    return torch.device(GPU, torch.cuda.current_device())


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Run on another stream, as CUDA asks for before a capture; the random state is restored."""
    with (
        torch.cuda.device(device),
        torch.random.fork_rng(devices=[device.index]),
        warnings.catch_warnings(),
    ):
        # torch's optimizers, before the capture for which they are made
        warnings.filterwarnings("ignore", "This instance was constructed with capturable")
        stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield
        current.wait_stream(stream)


def record(function: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Any, Any]:
    """Record a run of a function, which computes nothing yet.

    Args:
        function: The function.
        device: The GPU.
        pool: The memory pool of another graph; None for one of its own.

    Returns:
        The graph, with ``replay()``, ``pool()`` and ``reset()``; and the function's result.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool):
        output = function()
    return graph, output
