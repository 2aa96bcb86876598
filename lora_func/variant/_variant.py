"""The dict that is an adapter, and the tuple of functions that is a variant."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

from lora_func.configs import AdapterConfig
from lora_func.variant._axes import Axes, parse_axes
from lora_func.variant._peft_format import PeftFormat
from lora_func.variant._protocols import (
    ApplyFn,
    BiasFn,
    ConcludeFn,
    InitFn,
    JoinFn,
    LowRankFn,
    NormFn,
    ObserveFn,
    ParametersFn,
    PrepareFn,
    ProjectFn,
    SharedFn,
    WeightFn,
)

Params: TypeAlias = dict[str, Tensor]
"""An adapter: ``"{site}.{variant}.{leaf}" -> tensor``."""


Family: TypeAlias = Literal[
    "low-rank",
    "multiplicative",
    "orthogonal",
    "SVD",
    "sparse",
    "spectral",
    "shared",
    "bias",
    "full",
]
"""What the change of a weight is made of."""


class Trial(NamedTuple):
    """Settings with which examples and benchmarks try a variant.

    Attributes:
        settings: Fields of the config.
        lr: A round learning rate for AdamW.
        data: True if ``init`` gets calibration data, of the kind that the config names.
        start: "exact" if the adapter starts as the base bit for bit, "close" if up to rounding,
            "elsewhere" if it changes the model from the start.
        drops_sites: True if some of the named sites may end without an adapter.
        peft: The class and the settings of PEFT's config for the same method; None if PEFT has
            none.
    """

    settings: Mapping[str, Any] = {}
    lr: float = 1e-3
    data: bool = False
    start: Literal["exact", "close", "elsewhere"] = "exact"
    drops_sites: bool = False
    peft: tuple[str, Mapping[str, Any]] | None = None


class Variant(NamedTuple):
    """An adapter method: pure functions over the leaves of one site.

    Law: ``apply(Affine(W, b), p, x) == F.linear(x, weight(W, p), bias(b, p))``, with and without a
        bias.

    Attributes:
        name: The middle part of the keys: "lora".
        config: The config class, by which ``init`` finds the variant. Several variants may share a
            class whose property ``variant`` names the one that is meant.
        init: Makes the leaves of a site.
        apply: The activation view.
        leaves: Leaf -> the names of its axes, such as ``"d_out r"``; a "?" after the leaf's name
            says that it may be missing. ``r`` is the rank, ``d_out`` and ``d_in`` belong to the
            weight; words may be products (``a*b``, ``d_in/b``), and ``|`` separates alternatives.
            Empty for a variant with ``parameters``, whose leaves have the parameters' own names.
        family: The group in which tables show it; None for a group of its own.
        prepare: Computes what depends on the leaves alone: once in a call, for all sites of one
            kind, and not at each site. ``apply`` must do the same without it. None for nothing.
        casts: The leaves which ``apply`` needs in the dtype of the activations alone. They are cast
            once in a call, for all sites of one kind.
        weight: The weight view; None for a variant that is not linear in x.
        bias: The adapted bias; None if the bias does not change.
        shared: Makes what all sites share, kept once under the site ``*``.
        parameters: Replaces parameters of a module of any kind for the whole call, in place of
            ``apply``.
        observe: Gathers statistics from calibration data, if a config asks for it.
        join: Joins statistics that several ranks gathered from their parts of the data.
        conclude: Looks at the statistics of all sites before their leaves are made.
        delta_norm: The norm of the change of the weight, if it is cheap.
        low_rank: The change of the weight as products of two factors, which ``combine`` adds up
            exactly.
        neutral: Leaf -> its value at which it changes nothing, for a change that is linear in the
            trained leaves around that value; ``combine`` then adds the leaves.
        project: Moves the trained leaves into their bounds, after a step of an optimizer; None for
            a variant without bounds.
        peft: How PEFT stores the variant; several formats where PEFT has several.
        trials: Name -> settings with which examples and benchmarks try it.
        pads: True if zeros on the rank axes are exactly a smaller rank, and stay so in training;
            ``stack`` then pads.
        stacks: True if ``apply`` also takes K adapters at once, leaves (K, ...) and x (K, n, d_in).
            For any other variant ``vcall`` uses ``torch.vmap``, which is slower.
        products_only: True if ``apply`` uses of x only its dtype, ``linear(x, W)``, ``x @ M`` and
            ``dropout(x, rate)``. It then also runs embeddings and convolutions; other variants run
            there with the weight view, which is slower.
        builds_dense: True if ``apply`` builds a matrix of the size of W by nature.
    """

    name: str
    config: type[AdapterConfig]
    init: InitFn
    apply: ApplyFn
    leaves: Mapping[str, str]
    family: Family | None = None
    prepare: PrepareFn | None = None
    casts: tuple[str, ...] = ()
    weight: WeightFn | None = None
    bias: BiasFn | None = None
    shared: SharedFn | None = None
    parameters: ParametersFn | None = None
    observe: ObserveFn | None = None
    join: JoinFn | None = None
    conclude: ConcludeFn | None = None
    delta_norm: NormFn | None = None
    low_rank: LowRankFn | None = None
    neutral: Mapping[str, float] | None = None
    project: ProjectFn | None = None
    peft: tuple[PeftFormat, ...] = ()
    trials: Mapping[str, Trial] = {}
    pads: bool = False
    stacks: bool = False
    products_only: bool = False
    builds_dense: bool = False

    @property
    def axes(self) -> dict[str, Axes]:
        """Leaf -> the alternatives of its axes; optional leaves are included."""
        return {leaf.removesuffix("?"): parse_axes(text) for leaf, text in self.leaves.items()}

    @property
    def required(self) -> set[str]:
        """The leaves that must be there."""
        return {leaf for leaf in self.leaves if not leaf.endswith("?")}

    @property
    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        """Leaf -> its rank axes, counted from the end; empty for a variant without a rank."""
        found = {leaf: _rank_places(alternatives[0]) for leaf, alternatives in self.axes.items()}
        return {leaf: places for leaf, places in found.items() if places}


def check_variant(variant: Variant) -> None:
    """Check that a variant is well-formed.

    Raises:
        ValueError: If its name is not an identifier, its leaves are missing or malformed, casts
            names none of them, or the rank stands at different places in a leaf's alternatives.
    """
    if not variant.name.isidentifier():
        raise ValueError(
            f"{variant.name!r} cannot be part of a key; a variant's name is an identifier"
        )
    if unknown := {*variant.casts} - variant.axes.keys():
        raise ValueError(f"{variant.name}: casts names {sorted(unknown)}, which are no leaves")
    if not variant.leaves and variant.parameters is None:
        raise ValueError(
            f"{variant.name}: leaves is empty; name the axes of each leaf, such as "
            '{"B": "d_out r"}'
        )
    for leaf, alternatives in variant.axes.items():
        if len({*map(_rank_places, alternatives)}) > 1:
            raise ValueError(
                f"{variant.name}: the alternatives of {leaf!r} have the rank at different places; "
                "count from the last axis and put it at the same one"
            )


def _rank_places(words: tuple[str, ...]) -> tuple[int, ...]:
    """The places of the rank among the axes of a leaf, counted from the end."""
    return tuple(i - len(words) for i, word in enumerate(words) if word == "r")


def rank_of(variant: Variant, leaves: Mapping[str, Tensor]) -> int:
    """Read the rank of a site from the shapes of its leaves.

    Args:
        variant: The site's variant.
        leaves: The site's leaves, possibly with leading axes.

    Returns:
        The rank; 0 for a variant without a rank.

    Raises:
        ValueError: If the leaves disagree.
    """
    (rank,) = ranks_of(variant, [leaves])
    return rank


def ranks_of(variant: Variant, adapters: Iterable[Mapping[str, Tensor]]) -> list[int]:
    """Read the rank that each of several adapters has at a site.

    Args:
        variant: The site's variant.
        adapters: The leaves of each adapter there.

    Returns:
        The ranks, as ``rank_of`` reads them.

    Raises:
        ValueError: If the leaves of one adapter disagree.
    """
    axes, found = variant.rank_axes, []
    for leaves in adapters:
        ranks = {
            (leaf, axis): leaves[leaf].shape[axis]
            for leaf, places in axes.items()
            if leaf in leaves
            for axis in places
        }
        if len({*ranks.values()}) > 1:
            raise ValueError(f"{variant.name}: leaves of one site have different ranks, {ranks}")
        found.append(next(iter(ranks.values()), 0))
    return found
