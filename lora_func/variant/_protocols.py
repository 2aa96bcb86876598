"""The functions of a variant, each as a documented protocol."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Generator, Tensor, dtype

from lora_func.weights import Weight


class InitFn(Protocol):
    """Make the leaves of one site."""

    def __call__(self, W: Any, cfg: Any, generator: Generator, stats: Any, /) -> dict[str, Tensor]:
        """Make the leaves of one site, such that the layer computes what it did without them.

        Args:
            W: The frozen ``Weight``; for a ``ParameterConfig`` the parameters that it names, by
                name. Only read.
            cfg: The variant's config, resolved for this site.
            generator: The only source of randomness; a CPU generator.
            stats: The statistics of ``observe`` at this site, or what ``conclude`` made of them;
                None without data.

        Returns:
            The leaves. A name that starts with ``_`` is a constant. A constant may be a tensor of
            integers.
        """


class PrepareFn(Protocol):
    """Compute what depends on the leaves alone, once for all sites of one kind."""

    def __call__(
        self, params: Mapping[str, Tensor], shape: tuple[int, int], dtype: dtype, /
    ) -> dict[str, Tensor]:
        """Return what ``apply`` then finds among the leaves.

        Args:
            params: The leaves of the sites, without those in ``casts``. Each has an axis of sites
                in front, of size 1 if the sites share the leaf, and behind it an axis of adapters
                in a stack.
            shape: (d_out, d_in) of the weight.
            dtype: The dtype of the activations.

        Returns:
            Tensors with the same axes in front, under names of their own.
        """


class ApplyFn(Protocol):
    """Run the adapted layer: the activation view."""

    def __call__(self, W: Weight, params: Mapping[str, Tensor], x: Tensor, /) -> Tensor:
        """Return ``x W'ᵀ``, and ``+ b'`` if ``W`` carries a bias, in the cheapest correct form.

        Args:
            W: The frozen weight, read through ``linear`` and ``dense`` alone.
            params: The leaves of the site, in their own dtype; in a call of a model those in
                ``casts`` have the dtype of x, and what ``prepare`` made is among them.
            x: Activations, shape (..., d_in). The adapter computes in their dtype.

        Returns:
            Shape (..., d_out), in the dtype of the frozen layer's output.
        """


class WeightFn(Protocol):
    """Give the adapted weight: the weight view."""

    def __call__(self, W: Weight, params: Mapping[str, Tensor], /) -> Tensor:
        """Return the dense W', shape (d_out, d_in), in the dtype of W."""


class BiasFn(Protocol):
    """Give the adapted bias."""

    def __call__(self, b: Tensor | None, params: Mapping[str, Tensor], /) -> Tensor | None:
        """Return b', shape (d_out,), or None for no bias."""


class SharedFn(Protocol):
    """Make the leaves that all sites of a config share."""

    def __call__(
        self, weights: Mapping[str, Weight], cfg: Any, generator: Generator, /
    ) -> dict[str, Tensor]:
        """Return the leaves, given each site's frozen weight; names with ``_`` are constants."""


class ObserveFn(Protocol):
    """Gather statistics of one site from calibration data."""

    def __call__(self, cfg: Any, acc: Any, x: Tensor, gy: Any, /) -> Any:
        """Return new statistics. The function is pure: sites with the same input share results.

        Args:
            cfg: The config as the user gave it.
            acc: The result of the previous call; None at first.
            x: Inputs of the site, shape (n, d_in), without padding. For a config that asks for
                "pairs" shape (2, n, d_in): positive and negative, at the last token of each row.
            gy: Gradients of the loss with respect to the site's outputs, shape (n, d_out), if the
                config asks for "gradients"; else None.
        """


class JoinFn(Protocol):
    """Join the statistics of one site from two parts of the calibration data."""

    def __call__(self, first: Any, second: Any, /) -> Any:
        """Return what ``observe`` would have gathered from both parts, up to rounding."""


class ConcludeFn(Protocol):
    """Look at the statistics of all sites together."""

    def __call__(
        self, weights: Mapping[str, Weight], configs: Mapping[str, Any], stats: Mapping[str, Any], /
    ) -> dict[str, tuple[Any, Any]]:
        """Return (config, statistics) for ``init``, by site; a site left out gets no adapter.

        Args:
            weights: Each site's frozen weight.
            configs: Each site's resolved config.
            stats: Each site's statistics.
        """


class ParametersFn(Protocol):
    """Give the parameters that a module runs with."""

    def __call__(
        self, own: Mapping[str, Tensor], params: Mapping[str, Tensor], /
    ) -> dict[str, Tensor]:
        """Return the parameters to replace, by name, given the module's own."""


class NormFn(Protocol):
    """Measure the change of the weight, if that is cheap."""

    def __call__(
        self, params: Mapping[str, Tensor], shape: tuple[int, int] | None, /
    ) -> Tensor | None:
        """Return the Frobenius norm of W' - W; leading axes of the leaves are batch axes.

        Args:
            params: The leaves of the site.
            shape: (d_out, d_in) of the weight; None if no model is at hand.

        Returns:
            The norms; None if the shape is needed and unknown.
        """


class ProjectFn(Protocol):
    """Move the trained leaves of one site into their bounds."""

    def __call__(self, params: Mapping[str, Tensor], /) -> dict[str, Tensor]:
        """Return the leaves that have bounds, inside of them; leading axes are batch axes.

        Args:
            params: The leaves of the site.
        """


class LowRankFn(Protocol):
    """Write the change of the weight as products of two factors."""

    def __call__(self, params: Mapping[str, Tensor], /) -> list[tuple[Tensor, Tensor]]:
        """Return pairs (A, B) with ``W' - W = Σ B A``.

        Args:
            params: The leaves of the site, possibly with leading axes.

        Returns:
            A (..., r, d_in) and B (..., d_out, r) of each pair.
        """
