"""What every config has: where the adapter goes; for low-rank variants, how large it is."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, TypeAlias, TypeVar, get_args, overload

T = TypeVar("T")

ALL_LINEAR = "all-linear"

Patterns: TypeAlias = str | Sequence[str]
Role: TypeAlias = Literal["reader", "writer", "inner"]


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

    def at(self, site: str) -> Self:
        """Return the config that holds at one site, with the patterns over sites resolved."""
        return self

    def site_patterns(self) -> dict[str, tuple[str, ...]]:
        """Return the patterns that must each match a selected site, by the name of their field."""
        return {}


@dataclass(frozen=True, kw_only=True)
class LinearConfig(AdapterConfig):
    """A config whose sites are linear-like modules.

    Attributes:
        target_modules: A regular expression searched for in the module paths, or a sequence of
            them; or "all-linear": every linear-like module but the output head and MoE routers.
            Each pattern must match at least one of the sites that are left in the end.
        exclude_modules: Patterns of modules to leave out. Each must match at least one linear-like
            module.
        target_roles: Keep only modules of these roles, read from the shapes against the width of
            the residual stream: "reader" (stream to something else), "writer" (something else to
            the stream), "inner" (neither side). A square layer is a reader or a writer by where it
            stands in its block.
    """

    target_modules: Patterns = ALL_LINEAR
    exclude_modules: Patterns = ()
    target_roles: Role | Sequence[Role] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patterns("target_modules", self.target_modules)
        check_patterns("exclude_modules", self.exclude_modules)
        roles = self.target_roles
        for role in as_tuple(roles) if isinstance(roles, Sequence) else (roles,):
            if role not in get_args(Role):
                raise ValueError(f"target_roles: got {role!r}, expected any of {get_args(Role)}")
        if not as_tuple(self.target_modules):
            raise ValueError('target_modules: got no pattern; "all-linear" adapts every layer')

    def site_patterns(self) -> dict[str, tuple[str, ...]]:
        """Return the patterns of the modules to adapt."""
        patterns = as_tuple(self.target_modules)
        return {"target_modules": tuple(p for p in patterns if p != ALL_LINEAR)}


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
class LowRankConfig(LinearConfig):
    """A config of the family ``W + s B A``.

    Attributes:
        r: The rank, from 1 to min(d_out, d_in).
        alpha: Numerator of the scale ``s = alpha / r``. None means ``2 r``, so that ``s = 2`` at
            every rank.
        rank_pattern: Ranks for some sites: regular expression searched for in the site's path -> r.
        alpha_pattern: The same for alpha. A site may match several patterns only if they agree.
    """

    r: int = 8
    alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for field_name, table in self._tables().items():
            if not isinstance(table, Mapping):
                raise TypeError(f"{field_name}: got {table!r}, expected a dict of patterns")
            check_patterns(field_name, (*table,))
        for r in (self.r, *self.rank_pattern.values()):
            if isinstance(r, bool) or not isinstance(r, int) or r < 1:
                raise ValueError(f"r: got {r!r}, expected an integer of at least 1")
        alphas = [*self.alpha_pattern.values()]
        for alpha in alphas if self.alpha is None else (self.alpha, *alphas):
            number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
            if not (number and math.isfinite(alpha) and alpha > 0):
                raise ValueError(f"alpha: got {alpha!r}, expected a finite number above 0")

    @property
    def scale(self) -> float:
        """The factor ``s`` in ``W + s B A``."""
        return 2.0 if self.alpha is None else self.alpha / self.r

    def at(self, site: str) -> Self:
        """Return the config with the r and alpha of one site."""
        return replace(
            self,
            r=_of_site(self.rank_pattern, site, self.r),
            alpha=_of_site(self.alpha_pattern, site, self.alpha),
            rank_pattern={},
            alpha_pattern={},
        )

    def site_patterns(self) -> dict[str, tuple[str, ...]]:
        """Return the patterns of the modules to adapt, and those of both tables."""
        tables = {name: (*table,) for name, table in self._tables().items()}
        return super().site_patterns() | tables

    def _tables(self) -> dict[str, Mapping[str, float]]:
        return {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}


@overload
def as_tuple(one_or_more: str | Sequence[str]) -> tuple[str, ...]: ...
@overload
def as_tuple(one_or_more: int | Sequence[int]) -> tuple[int, ...]: ...
def as_tuple(one_or_more: Any) -> tuple[Any, ...]:
    """Return a tuple of what may be given alone or as a sequence."""
    return (one_or_more,) if isinstance(one_or_more, (str, int)) else tuple(one_or_more)


def check_patterns(field_name: str, patterns: Patterns) -> None:
    """Refuse what is not a regular expression or a sequence of them.

    Raises:
        TypeError: If a pattern is not a string.
        ValueError: If a pattern is not a valid regular expression.
    """
    if not isinstance(patterns, Sequence):
        raise TypeError(f"{field_name}: got {patterns!r}, expected a regular expression or several")
    for pattern in as_tuple(patterns):
        if not isinstance(pattern, str):
            raise TypeError(f"{field_name}: got {pattern!r}, expected a regular expression")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{field_name}: {pattern!r} is no regular expression: {error}"
            ) from None


def _of_site(table: Mapping[str, T], site: str, default: T) -> T:
    values = {pattern: value for pattern, value in table.items() if re.search(pattern, site)}
    if len(set(values.values())) > 1:
        raise ValueError(f"{site}: matched by patterns that disagree: {values}")
    return next(iter(values.values()), default)
