"""One adapted module or parameter, as the keys of an adapter name it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from weakref import ref

from torch import nn

from lora_func.adapter import SHARED, parse
from lora_func.modules import find_site, original_parameters
from lora_func.variant import Variant
from lora_func.weights import (
    bias_name,
    check_not_computed,
    has_matrix,
    is_linear,
    is_quantised,
    is_stack,
    matrix,
)

Reference = Callable[[], nn.Module | None]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False, slots=True)
class Site:
    """An adapted module or parameter, as the keys of an adapter name it.

    Attributes:
        path: Its path.
        reference: The module, or the module that holds the parameter; weak, so that a cached layout
            keeps no model alive.
        parameter: The parameter that gets an effective weight; None if the variant's ``apply``
            replaces the module's forward, or its ``parameters`` name the parameters.
        everywhere: True if parameters are replaced for the whole call, wherever they are read;
            False if they are replaced while their module runs.
        claims: The parameters that it adapts; None for the weight, and the bias if the variant has
            a view of it.
        variant: The variant.
        keys: Leaf -> key in the adapter.
        known: The keys whose leaves the variant has.
    """

    path: str
    reference: Reference
    parameter: str | None
    everywhere: bool
    claims: set[str] | None
    variant: Variant
    keys: dict[str, str]
    known: tuple[str, ...]

    @property
    def place(self) -> tuple[str, str]:
        """What tells it from the other sites of an adapter: its path and its variant's name."""
        return self.path, self.variant.name

    @property
    def changed_names(self) -> set[str]:
        """The parameters of the module that the adapter changes."""
        if self.claims is not None:
            return self.claims
        return {"weight"} if self.variant.bias is None else {"weight", "bias"}

    @property
    def module(self) -> nn.Module:
        """The module."""
        module = self.reference()
        assert module is not None, f"{self.path}: the module is gone"
        return module


def make_site(model: nn.Module, path: str, variant: Variant, keys: dict[str, str]) -> Site:
    """Find what the keys of one site name.

    Args:
        model: The model.
        path: The path in the keys.
        variant: The variant in the keys.
        keys: Leaf -> key.

    Returns:
        The site.

    Raises:
        KeyError: If the path names no module or parameter of the model.
        TypeError: If the variant cannot adapt it.
    """
    try:
        module, parameter = find_site(model, path)
    except KeyError as error:
        raise KeyError(f"{next(iter(keys.values()))!r}: {error.args[0]}") from None
    own = original_parameters(module)
    if variant.parameters is not None:
        for leaf in keys:
            if own.get(leaf) is None:
                raise KeyError(
                    f"{keys[leaf]!r}: {type(module).__name__} {path!r} has no parameter {leaf!r}"
                )
        known = tuple(keys.values())
        return Site(path, ref(module), None, True, {*keys}, variant, keys, known)
    known = tuple(key for leaf, key in keys.items() if leaf in variant.axes)
    never_called = _is_never_called(model, path)
    if parameter is None and is_linear(module) and not never_called:
        return Site(path, ref(module), None, False, None, variant, keys, known)
    name = parameter or "weight"
    _check_matrix(path, module, name, variant, as_module=parameter is None)
    claims = None
    if parameter is not None or never_called:
        beside = bias_name(own, name) if variant.bias is not None else None
        claims = {name} if beside is None else {name, beside}
    return Site(path, ref(module), name, claims is not None, claims, variant, keys, known)


def ndims_of(site: Site) -> dict[str, tuple[int, ...]]:
    """Key -> the numbers of axes of its leaf; leaves of a stack of weights have one more."""
    module, axes = site.module, site.variant.axes
    own = original_parameters(module)
    if site.variant.parameters is not None:
        return {key: (own[name].ndim,) for name, key in site.keys.items()}
    weight = None if site.parameter is None else matrix(module, own, site.parameter)
    return {
        key: tuple(
            len(words) + (is_stack(weight) and parse(key).site != SHARED) for words in axes[leaf]
        )
        for leaf, key in site.keys.items()
        if leaf in axes
    }


def _check_matrix(
    path: str, module: nn.Module, name: str, variant: Variant, as_module: bool
) -> None:
    if as_module and not has_matrix(module):
        raise TypeError(
            f"{path}: {variant.name} adapts torch.nn.Linear, transformers' Conv1D, bitsandbytes' "
            "quantised linear layers, convolutions, embeddings, and parameters by their own name; "
            f"found {type(module).__name__}"
        )
    if variant.weight is None:
        raise TypeError(
            f"{path}: {variant.name} is not linear in x and has no weight to put there; it adapts "
            "linear layers alone"
        )
    check_not_computed(path, original_parameters(module), name)
    if getattr(module, "sparse", False):
        raise TypeError(f"{path}: {variant.name} has no sparse gradients; set sparse=False")


def _is_never_called(model: nn.Module, path: str) -> bool:
    """True if torch's attention reads this module's weight and never calls the module."""
    parent, _, name = path.rpartition(".")
    around, _ = find_site(model, parent)
    return name == "out_proj" and isinstance(around, nn.MultiheadAttention)


def check_claims(site: Site, others: Iterable[Site]) -> None:
    """Check that no other site of the same module adapts the same parameters.

    Raises:
        ValueError: If one does.
    """
    for other in others:
        if both := site.changed_names & other.changed_names:
            raise ValueError(
                f"{site.path}: adapted twice, by {other.variant.name} at {other.path!r} and by "
                f"{site.variant.name}, in {sorted(both)}; a parameter takes one variant"
            )


def runs_apply(sites: Sequence[Site], module: nn.Module) -> bool:
    """True if the variant's ``apply`` replaces the module's forward."""
    if len(sites) == 1:
        (site,) = sites
        if site.variant.parameters is None:
            return site.parameter is None
        return type(module) is nn.Linear or is_quantised(module)
    # beside a variant that leaves the bias as it is, the bias may be trained itself
    kinds = [site.variant.parameters is None for site in sites if site.parameter is None]
    return sorted(kinds) == [False, True] and len(sites) == 2 and is_linear(module)


def runs_by_products(site: Site, module: nn.Module) -> bool:
    """True for ``nn.Embedding`` and ungrouped ``nn.Conv``, under a ``products_only`` variant."""
    if site.parameter != "weight" or not site.variant.products_only:
        return False
    if type(module) is nn.Embedding:
        return module.max_norm is None and not module.scale_grad_by_freq
    plain = type(module) in _CONVOLUTIONS and "_conv_forward" not in vars(module)
    return plain and getattr(module, "groups", 1) == 1
