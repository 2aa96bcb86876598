"""Capturing a function as a CUDA graph, and calling it."""

from collections.abc import Callable
from typing import Any

from lora_func.checks import check_count
from lora_func.compat import transformed
from lora_func.graphs import _cuda
from lora_func.graphs._arguments import Arguments, Results, arguments_of, results_of
from lora_func.graphs._watch import Watch
from lora_func.runtime import patched, unread_masks

_WATCHED = 3


class Captured:
    """A captured function: a call copies its arguments, replays the graph, and gives its results.

    Attributes:
        inputs: The tensors that the graph reads, in the tree of the arguments. They may be written
            to; a call with these very tensors copies nothing.
    """

    def __init__(self, graph: Any, arguments: Arguments, results: Results, copies: bool) -> None:
        self.inputs = arguments.tree()
        self._graph: Any = graph
        self._arguments = arguments
        self._results = results
        self._copies = copies

    def __call__(self, *args: Any) -> Any:
        """Run the function on other values.

        Args:
            *args: Arguments of the same tree, shapes, dtypes and device as the examples.

        Returns:
            The results: new tensors; with ``copies=False`` those of the graph.

        Raises:
            TypeError: If the tree is another one, a tensor is not on a GPU, or a leaf that is no
                tensor differs from the one that was captured.
            ValueError: If a tensor has another shape, dtype or device.
            RuntimeError: If the graph has been freed.
        """
        graph = self._live()
        self._arguments.fill(args)
        graph.replay()
        return self._results.tree(self._copies)

    def free(self) -> None:
        """Free the graph and its memory, also that of results with ``copies=False``."""
        if self._graph is not None:
            self._graph.reset()
        self._graph, self.inputs = None, ()
        self._arguments = self._arguments._replace(leaves=[])
        self._results = self._results._replace(leaves=[])

    def _live(self) -> Any:
        if self._graph is None:
            raise RuntimeError("capture: this graph has been freed; capture the function again")
        return self._graph


def capture(
    function: Callable[..., Any],
    *examples: Any,
    warmups: int = 3,
    copies: bool = True,
    pool: Captured | None = None,
) -> Captured:
    """Capture a function of tensors on a GPU as a CUDA graph, which is then replayed.

    A step on a small model, or a small batch, waits for the host to launch its kernels. A graph
    launches them all at once. The function may be a call, ``torch.func.grad_and_value(fcall,
    argnums=1)``, a ``vcall``, or a whole train step with clipping and a capturable optimizer.

    The arguments are copied into tensors of the graph, in one kernel. What the function uses from
    outside, such as the model and the parameters of an optimizer, is read and written where it
    lies: after it is moved or replaced, capture again. Before the capture the function runs
    ``3 + warmups`` times; what those runs wrote, and the random state, is then restored. Random
    numbers are new in each replay. While the function runs, transformers does not look into padding
    masks.

    Args:
        function: Called with the examples. It must do the same whatever the values are.
        *examples: Its arguments: trees of tensors on one GPU, modules, and plain values, which the
            graph holds for good.
        warmups: How often the function runs before the capture, after three runs that are watched.
        copies: Whether a call gives new tensors; else those that the next call overwrites.
        pool: A captured function whose memory is shared: the two must never run at the same time.

    Returns:
        The captured function.

    Raises:
        TypeError: If a tensor is not on a GPU, or something may hold tensors that are not seen.
        ValueError: If tensors are on several devices, or warmups is less than 1.
        RuntimeError: If the function waits for the GPU (the message says in which operation),
            writes to its arguments, or keeps a tensor of unknown start or a new one in each run;
            if a transform is active; or if there is no GPU.
    """
    check_count("warmups", warmups)
    if transformed():
        raise RuntimeError(
            "capture: a transform of torch.func is active; put the transform into the function"
        )
    arguments = arguments_of(examples)
    device = arguments.device or _cuda.current_device()
    shared = None if pool is None else pool._live().pool()
    with patched([unread_masks()]):
        with _cuda.aside(device):
            _warm_up(function, arguments, warmups)
        try:
            graph, output = _cuda.record(lambda: function(*arguments.tree()), device, shared)
        except Exception as error:
            error.add_note("while the function was captured as a CUDA graph")
            raise
    return Captured(graph, arguments, results_of(output), copies)


def _warm_up(function: Callable[..., Any], arguments: Arguments, warmups: int) -> None:
    """Run a function, and restore what it wrote."""
    watch = Watch(arguments.tensors)
    try:
        for watch.run in range(_WATCHED):
            with watch:
                function(*arguments.tree())
        _check_gradients(arguments)
        for _ in range(warmups):
            function(*arguments.tree())
    finally:
        watch.restore()


def _check_gradients(arguments: Arguments) -> None:
    for name, tensor in arguments.tensors.items():
        if tensor.grad is not None:
            raise RuntimeError(
                f"{name}: the function sets its .grad, which would be that of the graph's copy; "
                "let the function return the gradient, or use the tensor from outside"
            )
