"""What all configs share: which sites of a model they name, and ranks and alphas by site."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn, Self, TypeAlias, TypeVar, get_args

from lora_func.checks import as_tuple, check_count, check_number, check_patterns

T = TypeVar("T")

ALL_LINEAR = "all-linear"

Patterns: TypeAlias = str | Sequence[str]
Role: TypeAlias = Literal["reader", "writer", "inner"]
Calibration: TypeAlias = Literal["inputs", "gradients", "pairs"]


class FrozenDict(dict[str, Any]):
    """A hashable dict that cannot be changed: the form in which a config keeps its patterns."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("a config cannot be changed; make another one with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def _documented_fields(config: type) -> str:
    """The section "Attributes:" of a config class, without its title."""
    text = inspect.cleandoc(config.__dict__.get("__doc__") or "")
    found = re.search(r"^Attributes:\n((?:^ .*\n?|^\n)+)", text, re.MULTILINE)
    return found[1].rstrip() if found else ""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The part of a config that says which layers of the model take part.

    Attributes:
        layers: Indices of the layers to adapt, counted within each stack of layers (an encoder and
            a decoder are two stacks). Negative indices count from the end. None means all layers,
            and also modules outside any stack.
    """

    layers: int | Sequence[int] | None = None

    def __init_subclass__(cls) -> None:
        """Append the inherited fields to the docstring, so that ``help`` shows all of them."""
        inherited = [base for base in cls.__mro__[1:] if issubclass(base, AdapterConfig)]
        own = inspect.cleandoc(cls.__dict__.get("__doc__") or f"Config {cls.__name__}.")
        for base in inherited:
            fields = _documented_fields(base)
            if fields:
                own += f"\n\nAttributes of {base.__name__}:\n{fields}"
        cls.__doc__ = own

    def __post_init__(self) -> None:
        if self.layers is not None:
            if not isinstance(self.layers, (int, Sequence)):
                raise TypeError(f"layers: got {self.layers!r}, expected an int or several")
            for layer in as_tuple(self.layers):
                if isinstance(layer, bool) or not isinstance(layer, int):
                    raise TypeError(f"layers: got {layer!r}, expected an int or several")
            if not as_tuple(self.layers):
                raise ValueError("layers: got an empty sequence; leave it None to adapt all layers")
        for name, value in vars(self).items():
            object.__setattr__(self, name, _frozen(value))

    @property
    def variant(self) -> str | None:
        """Name of the variant, where several variants share this config class; else None."""
        return None

    @property
    def calibration(self) -> Calibration | None:
        """What ``init`` measures on data for this config; None if it needs no data.

        "inputs": the inputs of each site. "gradients": the gradients of its outputs as well.
        "pairs": its inputs at the last token, in pairs of a positive and a negative batch.
        """
        return None

    def at(self, site: str) -> Self:
        """Return the config for one site, with the patterns over sites resolved."""
        return self

    def site_patterns(self) -> dict[str, tuple[str, ...]]:
        """Return the patterns that must each match a selected site, by the name of their field."""
        return {}


@dataclass(frozen=True, kw_only=True)
class LinearConfig(AdapterConfig):
    """A config whose sites are layers and parameters that are matrices.

    Attributes:
        target_modules: A regular expression that is searched for in the paths of linear layers,
            convolutions and embeddings, or a sequence of them; or "all-linear": every linear layer
            except the output head, MoE routers and layers that the model never calls. Each pattern
            must match at least one selected site.
        target_parameters: The same for names of parameters of two or three axes, such as stacked
            experts. A parameter that modules share is adapted in all of them. A module that
            ``target_modules`` names is adapted alone.
        exclude_modules: Patterns of sites to leave out. Each pattern must match at least one site
            that could be adapted.
        target_roles: Keep only modules of these roles, which are read from the shapes and the width
            of the residual stream: "reader" (reads the stream), "writer" (writes to it), "inner"
            (touches it on neither side). The place in its block decides for a square layer.
    """

    target_modules: Patterns = ALL_LINEAR
    target_parameters: Patterns = ()
    exclude_modules: Patterns = ()
    target_roles: Role | Sequence[Role] = ()

    def __post_init__(self) -> None:
        check_patterns("target_modules", self.target_modules)
        check_patterns("target_parameters", self.target_parameters)
        check_patterns("exclude_modules", self.exclude_modules)
        roles = self.target_roles
        for role in as_tuple(roles) if isinstance(roles, Sequence) else (roles,):
            if role not in get_args(Role):
                raise ValueError(f"target_roles: got {role!r}, expected any of {get_args(Role)}")
        if not as_tuple(self.target_modules) and not as_tuple(self.target_parameters):
            raise ValueError('target_modules: got no pattern; "all-linear" adapts every layer')
        super().__post_init__()

    def site_patterns(self) -> dict[str, tuple[str, ...]]:
        """Return the patterns of the modules and parameters to adapt."""
        patterns = as_tuple(self.target_modules)
        return {
            "target_modules": tuple(p for p in patterns if p != ALL_LINEAR),
            "target_parameters": as_tuple(self.target_parameters),
        }


@dataclass(frozen=True, kw_only=True)
class ParameterConfig(AdapterConfig):
    """A config that names parameters of modules of any kind.

    Attributes:
        target_parameters: A regular expression that is searched for in the names of the model's
            parameters, or a sequence of them. Each must match at least one parameter.
    """

    target_parameters: Patterns

    def __post_init__(self) -> None:
        check_patterns("target_parameters", self.target_parameters)
        if not as_tuple(self.target_parameters):
            raise ValueError('target_parameters: got no pattern; ".*" trains every parameter')
        super().__post_init__()

    def site_patterns(self) -> dict[str, tuple[str, ...]]:
        """Return the patterns of the parameters to train."""
        return {"target_parameters": as_tuple(self.target_parameters)}


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
        for r in (self.r, *self.rank_pattern.values()):
            check_count("r", r)
        super().__post_init__()

    def at(self, site: str) -> Self:
        """Return the config with the rank of one site."""
        r = _of_site(self.rank_pattern, site, self.r)
        return replace(super().at(site), r=r, rank_pattern={})

    def site_patterns(self) -> dict[str, tuple[str, ...]]:
        """Return the patterns of the modules to adapt, and those over ranks."""
        return super().site_patterns() | {"rank_pattern": (*self.rank_pattern,)}


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(RankConfig):
    """A config of the family ``W + s B A``, with r from 1 to min(d_out, d_in).

    Attributes:
        alpha: Numerator of the scale ``s = alpha / r``. None, the default, means ``alpha = 2 r``:
            the scale is 2 at every rank.
        alpha_pattern: Alphas for some sites, by pattern like the ranks.
    """

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
        """The factor ``s`` in ``W + s B A``."""
        return 2.0 if self.alpha is None else self.alpha / self.r

    def at(self, site: str) -> Self:
        """Return the config with the r and alpha of one site."""
        alpha = _of_site(self.alpha_pattern, site, self.alpha)
        return replace(super().at(site), alpha=alpha, alpha_pattern={})

    def site_patterns(self) -> dict[str, tuple[str, ...]]:
        """Return the patterns of the modules to adapt, and those over ranks and alphas."""
        return super().site_patterns() | {"alpha_pattern": (*self.alpha_pattern,)}


def _frozen(value: Any) -> Any:
    """An immutable copy of a field's value."""
    if isinstance(value, Mapping):
        return FrozenDict({key: _frozen(one) for key, one in value.items()})
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(map(_frozen, value))
    return value


def _check_table(field_name: str, table: Any) -> None:
    if not isinstance(table, Mapping):
        raise TypeError(f"{field_name}: got {table!r}, expected a dict of patterns")
    check_patterns(field_name, (*table,))


def _of_site(table: Mapping[str, T], site: str, default: T) -> T:
    values = {pattern: value for pattern, value in table.items() if re.search(pattern, site)}
    if len(set(values.values())) > 1:
        raise ValueError(f"{site}: matched by patterns that disagree: {values}")
    return next(iter(values.values()), default)
