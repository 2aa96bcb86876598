"""The gradient of the loss in a site's weight, summed over calibration data."""

from typing import Any, NamedTuple

from torch import Tensor

from lora_func.numerics._linalg import at_least_float32


class WeightGradient(NamedTuple):
    """The gradient in W, in float32 or better.

    Attributes:
        total: The sum over the batches, shape (d_out, d_in).
        batches: How many times the site ran.
    """

    total: Tensor
    batches: int

    def check(self) -> None:
        """Check that the gradient says something.

        Raises:
            ValueError: If it is zero, or holds NaN or infinity.
        """
        if not (self.total.isfinite().all() and self.total.any()):
            raise ValueError("the gradient is zero, or holds NaN or infinity; pass other data")


def observe_gradient(cfg: Any, acc: WeightGradient | None, x: Tensor, gy: Tensor) -> WeightGradient:
    """Add the gradient in W of one batch.

    Args:
        cfg: The site's config.
        acc: What was gathered so far.
        x: Rows of the input, shape (n, d_in).
        gy: The gradient of the loss in the same rows of the output, shape (n, d_out).

    Returns:
        The gradient so far.
    """
    gradient = WeightGradient(at_least_float32(gy).mT @ at_least_float32(x), 1)
    return gradient if acc is None else join_gradients(acc, gradient)


def join_gradients(first: WeightGradient, second: WeightGradient) -> WeightGradient:
    """Join the gradients of two parts of the data."""
    return WeightGradient(first.total + second.total, first.batches + second.batches)
