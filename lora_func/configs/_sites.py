"""Configs by the sites that they name: matrices, or parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lora_func.checks import as_tuple, check_patterns
from lora_func.configs._base import AdapterConfig

ALL_LINEAR = "all-linear"

Patterns: TypeAlias = str | Sequence[str]
Role: TypeAlias = Literal["reader", "writer", "inner"]


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
