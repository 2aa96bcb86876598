"""What every config has: where the adapter goes; for low-rank variants, how large it is."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, TypeAlias, TypeVar, get_args

from lora_func.checks import as_tuple, check_count, check_number, check_patterns

T = TypeVar("T")

ALL_LINEAR = "all-linear"

Patterns: TypeAlias = str | Sequence[str]
Role: TypeAlias = Literal["reader", "writer", "inner"]
Calibration: TypeAlias = Literal["inputs", "gradients", "pairs"]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The part of a config that says which layers of the model take part.

    Attributes:
        layers: Indices of the layers to adapt, counted within each stack of layers (an encoder and
            a decoder are two); negative ones count from the end. None means all of them, and
            modules outside any stack too.
    """

    layers: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.layers is None:
            return
        if not isinstance(self.layers, (int, Sequence)):
            raise TypeError(f"layers: got {self.layers!r}, expected an int or a sequence of ints")
        for layer in as_tuple(self.layers):
            if isinstance(layer, bool) or not isinstance(layer, int):
                raise TypeError(f"layers: got {layer!r}, expected an int or a sequence of ints")
        if not as_tuple(self.layers):
            raise ValueError("layers: got an empty sequence; leave it None to adapt every layer")

    @property
    def variant(self) -> str | None:
        """Name of the variant that is meant, where several share this class; else None."""
        return None

    @property
    def calibration(self) -> Calibration | None:
        """What the variant can learn from data before it starts; None if nothing.

        "inputs": the inputs of each site. "gradients": the gradients of its outputs as well.
        "pairs": its inputs at the last token, in pairs of a positive and a negative batch.
        """
        return None

    def at(self, site: str) -> Self:
        """Return the config that holds at one site, with the patterns over sites resolved."""
        return self

    def site_patterns(self) -> dict[str, tuple[str, ...]]:
        """Return the patterns that must each match a selected site, by the name of their field."""
        return {}


@dataclass(frozen=True, kw_only=True)
class LinearConfig(AdapterConfig):
    """A config whose sites are layers and parameters that are matrices.

    Attributes:
        target_modules: A regular expression searched for in the paths of linear layers,
            convolutions and embeddings, or a sequence of them; or "all-linear": every linear layer
            but the output head and MoE routers. Each pattern must match at least one of the sites
            that are left in the end.
        target_parameters: The same for names of parameters of two or three axes, such as stacked
            experts. A parameter that modules share is adapted in all of them, whereas a module
            stands for itself alone.
        exclude_modules: Patterns of sites to leave out. Each must match at least one that could be
            adapted.
        target_roles: Keep only modules of these roles, read from the shapes against the width of
            the residual stream: "reader" (stream to something else), "writer" (something else to
            the stream), "inner" (neither side). A square layer is a reader or a writer by where it
            stands in its block.
    """

    target_modules: Patterns = ALL_LINEAR
    target_parameters: Patterns = ()
    exclude_modules: Patterns = ()
    target_roles: Role | Sequence[Role] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patterns("target_modules", self.target_modules)
        check_patterns("target_parameters", self.target_parameters)
        check_patterns("exclude_modules", self.exclude_modules)
        roles = self.target_roles
        for role in as_tuple(roles) if isinstance(roles, Sequence) else (roles,):
            if role not in get_args(Role):
                raise ValueError(f"target_roles: got {role!r}, expected any of {get_args(Role)}")
        if not as_tuple(self.target_modules) and not as_tuple(self.target_parameters):
            raise ValueError('target_modules: got no pattern; "all-linear" adapts every layer')

    def site_patterns(self) -> dict[str, tuple[str, ...]]:
        """Return the patterns of the modules and parameters to adapt."""
        patterns = as_tuple(self.target_modules)
        return {
            "target_modules": tuple(p for p in patterns if p != ALL_LINEAR),
            "target_parameters": as_tuple(self.target_parameters),
        }


@dataclass(frozen=True, kw_only=True)
class ParameterConfig(AdapterConfig):
    """A config whose sites are modules of any kind, of which it names parameters.

    Attributes:
        target_parameters: A regular expression searched for in the names of the model's parameters,
            or a sequence of them. Each must match at least one.
    """

    target_parameters: Patterns

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patterns("target_parameters", self.target_parameters)
        if not as_tuple(self.target_parameters):
            raise ValueError('target_parameters: got no pattern; ".*" trains every parameter')

    def site_patterns(self) -> dict[str, tuple[str, ...]]:
        """Return the patterns of the parameters to train."""
        return {"target_parameters": as_tuple(self.target_parameters)}


@dataclass(frozen=True, kw_only=True)
class RankConfig(LinearConfig):
    """A config whose adapters have a rank, which may differ by site.

    Attributes:
        r: The rank, at least 1; what it counts and how large it may be is the variant's to say.
        rank_pattern: Ranks for some sites: regular expression searched for in the site's path -> r.
            A site may match several patterns only if they agree.
    """

    r: int = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_table("rank_pattern", self.rank_pattern)
        for r in (self.r, *self.rank_pattern.values()):
            check_count("r", r)

    def at(self, site: str) -> Self:
        """Return the config with the rank of one site."""
        r = _of_site(self.rank_pattern, site, self.r)
        return replace(super().at(site), r=r, rank_pattern={})

    def site_patterns(self) -> dict[str, tuple[str, ...]]:
        """Return the patterns of the modules to adapt, and those over ranks."""
        return super().site_patterns() | {"rank_pattern": (*self.rank_pattern,)}


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(RankConfig):
    """A config of the family ``W + s B A``, whose r goes from 1 to min(d_out, d_in).

    Attributes:
        alpha: Numerator of the scale ``s = alpha / r``. None means ``2 r``, so that ``s = 2`` at
            every rank.
        alpha_pattern: Alphas for some sites, by pattern like the ranks.
    """

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_table("alpha_pattern", self.alpha_pattern)
        alphas = [*self.alpha_pattern.values()]
        for alpha in alphas if self.alpha is None else (self.alpha, *alphas):
            check_number("alpha", alpha, above=0)

    @property
    def scale(self) -> float:
        """The factor ``s`` in ``W + s B A``."""
        return 2.0 if self.alpha is None else self.alpha / self.r

    def at(self, site: str) -> Self:
        """Return the config with the r and alpha of one site."""
        alpha = _of_site(self.alpha_pattern, site, self.alpha)
        return replace(super().at(site), alpha=alpha, alpha_pattern={})

    def site_patterns(self) -> dict[str, tuple[str, ...]]:
        """Return the patterns of the modules to adapt, and those over ranks and alphas."""
        return super().site_patterns() | {"alpha_pattern": (*self.alpha_pattern,)}


def _check_table(field_name: str, table: Any) -> None:
    if not isinstance(table, Mapping):
        raise TypeError(f"{field_name}: got {table!r}, expected a dict of patterns")
    check_patterns(field_name, (*table,))


def _of_site(table: Mapping[str, T], site: str, default: T) -> T:
    values = {pattern: value for pattern, value in table.items() if re.search(pattern, site)}
    if len(set(values.values())) > 1:
        raise ValueError(f"{site}: matched by patterns that disagree: {values}")
    return next(iter(values.values()), default)
