"""Configs of adapters that have a rank, a scale or dropout."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, TypeVar

from lora_func.checks import check_count, check_number, check_patterns
from lora_func.configs._base import AdapterConfig
from lora_func.configs._sites import LinearConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RankConfig(LinearConfig):
    """A config whose adapters have a rank, which may differ by site.

    Attributes:
        r: The rank, at least 1. The variant defines what it counts and its largest value.
        rank_pattern: Ranks for some sites: regular expression searched for in the site's path -> r.
            A site may match several patterns only if they agree.
    """

    r: int = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_table("rank_pattern", self.rank_pattern)
        for r in self.ranks:
            check_count("r", r)
        super().__post_init__()

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank, and those of its exceptions."""
        return self.r, *self.rank_pattern.values()

    def at(self, site: str) -> Self:
        """Return the config with the rank of one site."""
        r = _of_site(self.rank_pattern, site, self.r)
        return replace(super().at(site), r=r, rank_pattern={})

    def site_patterns(self) -> dict[str, tuple[str, ...]]:
        """Return the patterns of the modules to adapt, and those over ranks."""
        return super().site_patterns() | {"rank_pattern": (*self.rank_pattern,)}


@dataclass(frozen=True, kw_only=True)
class DropoutConfig(AdapterConfig):
    """A config whose trained term may drop parts of its input while its module trains.

    Attributes:
        dropout: The probability with which an element of the input of the trained term is zero in
            training mode; the frozen layer gets the whole input. Only for layers that are called:
            an embedding drops nothing, and a parameter that is read past its module is refused.
    """

    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_number("dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout!r}, expected at least 0 and below 1")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class ScaledConfig(RankConfig):
    """A config whose change of the weight has a scale, which may differ by site.

    Attributes:
        alpha: Numerator of the scale ``s = alpha / r``. None, the default, means the scale that is
            usual for the method, at every rank; it is 2 unless the method says otherwise.
        alpha_pattern: Alphas for some sites, by pattern like the ranks.
    """

    usual_scale: ClassVar[float] = 2.0
    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_table("alpha_pattern", self.alpha_pattern)
        alphas = [*self.alpha_pattern.values()]
        for alpha in alphas if self.alpha is None else (self.alpha, *alphas):
            check_number("alpha", alpha, above=0)
        super().__post_init__()

    @property
    def scale(self) -> float:
        """The factor ``s``."""
        return self.usual_scale if self.alpha is None else self.alpha / self.r

    def at(self, site: str) -> Self:
        """Return the config with the r and alpha of one site."""
        alpha = _of_site(self.alpha_pattern, site, self.alpha)
        return replace(super().at(site), alpha=alpha, alpha_pattern={})

    def site_patterns(self) -> dict[str, tuple[str, ...]]:
        """Return the patterns of the modules to adapt, and those over ranks and alphas."""
        return super().site_patterns() | {"alpha_pattern": (*self.alpha_pattern,)}


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(DropoutConfig, ScaledConfig):
    """A config of the family ``W + s B A``: a rank, a scale and dropout."""


def _check_table(field_name: str, table: Any) -> None:
    if not isinstance(table, Mapping):
        raise TypeError(f"{field_name}: got {table!r}, expected a dict of patterns")
    check_patterns(field_name, (*table,))


def _of_site(table: Mapping[str, T], site: str, default: T) -> T:
    values = {pattern: value for pattern, value in table.items() if re.search(pattern, site)}
    if len(set(values.values())) > 1:
        raise ValueError(f"{site}: matched by patterns that disagree: {values}")
    return next(iter(values.values()), default)
