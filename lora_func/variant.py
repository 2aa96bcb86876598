"""The types: the dict that is an adapter, and the tuple of functions that is a variant."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

from torch import Generator, Tensor

from lora_func.configs import AdapterConfig
from lora_func.weights._layers import Weight

Params: TypeAlias = dict[str, Tensor]
"""An adapter: ``"{site}.{variant}.{leaf}" -> tensor``."""


class InitFn(Protocol):
    """Make the leaves of one site."""

    def __call__(self, W: Any, cfg: Any, generator: Generator, stats: Any, /) -> dict[str, Tensor]:
        """Make the leaves of one site, such that the layer computes what it did.

        Args:
            W: The frozen ``Weight``, only read; for a ``ParameterConfig`` the parameters it names,
                by name.
            cfg: The variant's config, resolved for this site.
            generator: The only source of randomness; a CPU generator.
            stats: What ``observe`` gathered at this site, or what ``conclude`` made of it; None
                without data.

        Returns:
            The leaves. A name that starts with ``_`` is a constant; integer constants may be given
            as integers.
        """


class ApplyFn(Protocol):
    """Run the adapted layer: the activation view."""

    def __call__(self, W: Weight, params: Mapping[str, Tensor], x: Tensor, /) -> Tensor:
        """Return ``x W'ᵀ``, and ``+ b'`` if ``W`` carries a bias, in the cheapest correct form.

        Args:
            W: The frozen weight, read through ``linear`` and ``dense`` alone.
            params: The leaves of the site, in their own dtype.
            x: Activations, shape (..., d_in); the adapter's part is computed in their dtype.

        Returns:
            Shape (..., d_out), in the dtype that the frozen layer would have given.
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
    """Make the constants that all sites of a config share."""

    def __call__(
        self, weights: Mapping[str, Weight], cfg: Any, generator: Generator, /
    ) -> dict[str, Tensor]:
        """Return the constants, whose names start with ``_``, given each site's frozen weight."""


class ObserveFn(Protocol):
    """Gather statistics of one site from calibration data."""

    def __call__(self, cfg: Any, acc: Any, x: Tensor, gy: Any, /) -> Any:
        """Return new statistics; a pure function, so that sites with the same input share them.

        Args:
            cfg: The config as the user gave it.
            acc: What the last call returned; None at first.
            x: Inputs of the site, shape (n, d_in), without padding. For a config that asks for
                "pairs" shape (2, n, d_in): positive and negative, at the last token of each row.
            gy: Gradients of the loss in the site's outputs, shape (n, d_out), where the config asks
                for "gradients"; else None.
        """


class ConcludeFn(Protocol):
    """Let the statistics of all sites decide together."""

    def __call__(
        self, weights: Mapping[str, Weight], configs: Mapping[str, Any], stats: Mapping[str, Any], /
    ) -> dict[str, tuple[Any, Any]]:
        """Return (config, statistics) for ``init``, by site; a site left out gets no adapter.

        Args:
            weights: Each site's frozen weight.
            configs: Each site's resolved config.
            stats: What ``observe`` gathered at each site.
        """


class ParametersFn(Protocol):
    """Give the parameters that a module runs with."""

    def __call__(
        self, own: Mapping[str, Tensor], params: Mapping[str, Tensor], /
    ) -> dict[str, Tensor]:
        """Return the parameters to replace, by name, given the module's own."""


class NormFn(Protocol):
    """Measure the adapter where that is cheap."""

    def __call__(self, params: Mapping[str, Tensor], /) -> Tensor:
        """Return the Frobenius norm of W' - W; leading axes of the leaves are batch axes."""


class Variant(NamedTuple):
    """An adapter method: pure functions over the leaves of one site.

    Law: ``apply(Affine(W, b), p, x) == F.linear(x, weight(W, p), bias(b, p))``, for any bias or
        none.

    Attributes:
        name: The middle part of the keys: "lora".
        config: The config class, by which ``init`` finds the variant; several variants may share
            one, whose property ``variant`` then tells them apart.
        init: Makes the leaves.
        apply: The activation view.
        weight: The weight view; None for a variant that is not linear in x.
        bias: The adapted bias; None if the bias is left as it is.
        shared: Makes what all sites share, kept once under the site ``*``.
        parameters: Replaces parameters of a module of any kind for the whole call; where a variant
            has it, ``fcall`` goes this way and not through ``apply``.
        observe: Gathers statistics from calibration data, where a config asks for it.
        conclude: Looks at the statistics of all sites before their leaves are made.
        delta_norm: The norm of the change, where it is cheap.
        leaves: Leaf -> the names of its axes, such as "d_out r"; a "?" after the leaf's name says
            that it may be missing. ``r`` is the rank, ``d_out`` and ``d_in`` are the weight's, a
            digit is a size, any other name stands for one size throughout the site.
        pads: Whether a row of zeros on the rank axes is a rank less exactly, and stays so under
            training. It lets ``stack`` pad.
        stacks: Whether ``apply`` also takes K adapters at once, leaves (K, ...) and x (K, n, d_in);
            of any other ``vcall`` makes that by ``torch.vmap``, which is slower.
        products_only: Whether ``apply`` uses of x its dtype, ``linear(x, W)`` and ``x @ M`` alone.
            Then it also runs embeddings and convolutions, where x is no tensor; with any other
            variant those run with the weight view, which is slower.
    """

    name: str
    config: type[AdapterConfig]
    init: InitFn
    apply: ApplyFn
    weight: WeightFn | None = None
    bias: BiasFn | None = None
    shared: SharedFn | None = None
    parameters: ParametersFn | None = None
    observe: ObserveFn | None = None
    conclude: ConcludeFn | None = None
    delta_norm: NormFn | None = None
    leaves: Mapping[str, str] = {}
    pads: bool = True
    stacks: bool = False
    products_only: bool = False

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Leaf -> the names of its axes, whether it may be missing or not."""
        return {leaf.removesuffix("?"): (*of.split(),) for leaf, of in self.leaves.items()}

    @property
    def rank_axes(self) -> dict[str, int]:
        """Leaf -> its rank axis, counted from the end; empty for a variant without rank."""
        axes = self.axes.items()
        return {leaf: names.index("r") - len(names) for leaf, names in axes if "r" in names}


def rank_of(variant: Variant, leaves: Mapping[str, Tensor]) -> int:
    """Read the rank of a site from the shapes of its leaves.

    Args:
        variant: The site's variant.
        leaves: The site's leaves, possibly with leading adapter axes.

    Returns:
        The rank; 0 for a variant that has none.

    Raises:
        ValueError: If the leaves disagree.
    """
    (rank,) = ranks_of(variant, [leaves])
    return rank


def ranks_of(variant: Variant, adapters: Iterable[Mapping[str, Tensor]]) -> list[int]:
    """Read the rank that each of several adapters has at a site.

    Args:
        variant: The site's variant.
        adapters: Each one's leaves there.

    Returns:
        The ranks, as ``rank_of`` reads them.

    Raises:
        ValueError: If the leaves of one disagree.
    """
    axes, found = variant.rank_axes, []
    for leaves in adapters:
        ranks = {leaf: leaves[leaf].shape[axis] for leaf, axis in axes.items() if leaf in leaves}
        if len({*ranks.values()}) > 1:
            raise ValueError(f"{variant.name}: leaves of one site have different ranks, {ranks}")
        found.append(next(iter(ranks.values()), 0))
    return found
