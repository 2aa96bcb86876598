"""An adapter as parametrizations of a live model, for code that needs parameters and modules."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_func.compat import parameters_of
from lora_func.modules import inner_model, shared_parameters
from lora_func.runtime import (
    Site,
    adapted_bias,
    adapted_weight,
    check_idle,
    check_single,
    name_for_bias,
    weight_view,
)
from lora_func.variant import Params
from lora_func.weights import is_packed, is_stack, matrix, restore_layout


class Attached:
    """An adapter that is attached to a model, and a context manager that removes it at the end.

    Attributes:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._leaves: dict[str, tuple[_Leaves, str]] = {}
        self._places: dict[tuple[nn.Module, str], list[str]] = {}
        self._required_grad = [(p, p.requires_grad) for p in model.parameters()]

    def params(self) -> Params:
        """Return the current adapter: new tensors, in the form that ``init`` gives."""
        return {
            key: getattr(leaves, name).detach().clone().requires_grad_(not name.startswith("_"))
            for key, (leaves, name) in self._leaves.items()
        }

    def remove(self, *, merge: bool = False) -> None:
        """Remove the adapter; the model then has its former types, names and bits.

        Args:
            merge: Whether the model keeps the adapted weights, written into its own parameters.

        Raises:
            ValueError: If merging would change another place of a tied weight, or the adapter has
                been removed already.
        """
        if merge and not self._places:
            raise ValueError("merge: the adapter has been removed; use lora_func.merge")
        merged = {place: getattr(*place).detach().clone() for place in self._places if merge}
        self._check_tied(merged)
        for (module, name), order in reversed(self._places.items()):
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            own = parameters_of(module)
            own.update({kept: own.pop(kept) for kept in order if kept in own})
        with torch.no_grad():
            for (module, name), tensor in merged.items():
                getattr(module, name).copy_(tensor)
        for parameter, required in self._required_grad:
            parameter.requires_grad_(required)
        self._places.clear()
        self._required_grad.clear()

    def _check_tied(self, merged: Mapping[tuple[nn.Module, str], Tensor]) -> None:
        originals: dict[int, Tensor] = {}
        for place, tensor in merged.items():
            if not torch.equal(originals.setdefault(id(_original(*place)), tensor), tensor):
                raise ValueError(
                    f"{place[1]}: two places of one parameter are adapted to differ, which it "
                    "cannot hold; use lora_func.merge(model, params, tied='untie')"
                )
        for path, module in self.model.named_modules():
            for name, parameter in parameters_of(module).items():
                inside = isinstance(module, parametrize.ParametrizationList)
                if id(parameter) in originals and not inside:
                    raise ValueError(
                        f"{path}.{name}: is tied to a parameter that the adapter changes, and "
                        "would change with it; use lora_func.merge(model, params, tied='untie')"
                    )

    def __enter__(self) -> "Attached":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


class _Leaves(nn.Module):
    """The leaves of a site: parameters, and buffers for constants."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, leaf in leaves.items():
            if name.startswith("_"):
                self.register_buffer(name, leaf)
            else:
                self.register_parameter(name, nn.Parameter(leaf))

    def tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


class _View(nn.Module):
    """Gives the adapted parameter for the frozen one."""

    def __init__(self, site: Site, module: nn.Module, name: str, leaves: _Leaves) -> None:
        super().__init__()
        self.leaves = leaves
        self.site = site
        self.name = name
        self.around = (module,)  # in a tuple, so that it is not registered as a child


class _Trained(_View):
    def forward(self, tensor: Tensor) -> Tensor:
        """Return the leaf itself."""
        return self.leaves.tensors()[self.name].to(tensor.dtype)


class _Weight(_View):
    def forward(self, tensor: Tensor) -> Tensor:
        """Return the adapted weight."""
        (module,), own = self.around, {self.name: tensor}
        W = matrix(module, own, self.name)
        weight = adapted_weight(self.site, W, self.leaves.tensors())
        return restore_layout(module, own, self.name, weight)


class _Bias(_View):
    def forward(self, tensor: Tensor) -> Tensor:
        """Return the adapted bias."""
        bias = adapted_bias(self.site, tensor, self.leaves.tensors(), tensor.ndim == 2)
        assert bias is not None
        return bias.to(tensor.dtype)


def attach(model: nn.Module, params: Mapping[str, Tensor]) -> Attached:
    """Register an adapter as parametrizations of a live model.

    The trained leaves become parameters of the model, which any optimizer, trainer or wrapper then
    finds. The model's own parameters are frozen until the adapter is removed. Each adapted weight
    is computed when it is read; ``torch.nn.utils.parametrize.cached()`` keeps it, for example in
    ``generate``.

    Args:
        model: The model.
        params: The adapter; it is copied.

    Returns:
        The handle: ``params()`` gives the current adapter, ``remove()`` removes it. A ``with``
        block removes it at the end.

    Raises:
        KeyError: If a key names no module or parameter of the model, or no variant.
        TypeError: If a variant has no weight, or a layer's weight is quantised or computed; use a
            block of ``adapted`` then.
        ValueError: If two variants name one module, a leaf is missing, unknown or of another shape,
            params is a stack, or the model has an adapter attached.
        BusyModelError: If the model is running with an adapter.

    Example:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> with lf.attach(model, lf.init(model, lf.LoRA(r=2))) as handle:
        ...     [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.parametrizations.weight.0.leaves.A', '0.parametrizations.weight.0.leaves.B']
        >>> list(handle.params())
        ['0.lora.A', '0.lora.B', '0.lora._scale']
    """
    model = inner_model(model)
    check_idle(model, "attach when it is not")
    if any(isinstance(module, _View) for module in model.modules()):
        raise ValueError("model: has an adapter attached; remove that first")
    layout = check_single(params, model)
    copies = {key: leaf.detach().clone() for key, leaf in params.items()}
    places, handle = shared_parameters(model), Attached(model)
    views: list[tuple[nn.Module, str, _View]] = []
    for site in layout.sites:
        leaves = _Leaves({leaf: copies[key] for leaf, key in site.keys.items()})
        handle._leaves |= {key: (leaves, leaf) for leaf, key in site.keys.items()}
        for module, name, view in _views(site, leaves):
            here = [(module, name)]
            everywhere = places.get((module, name), here) if site.everywhere else here
            views += [(*place, view) for place in everywhere]
    handle._leaves = {key: handle._leaves[key] for key in params}
    try:
        model.requires_grad_(False)
        for module, name, view in views:
            order = [*parameters_of(module)]
            parametrize.register_parametrization(module, name, view, unsafe=True)
            handle._places[module, name] = order
    except BaseException:
        handle.remove()
        raise
    return handle


def _views(site: Site, leaves: _Leaves) -> Iterator[tuple[nn.Module, str, _View]]:
    module = site.module
    if site.variant.parameters is not None:
        yield from ((module, name, _Trained(site, module, name, leaves)) for name in site.keys)
        return
    weight_view(site)
    name, own = site.parameter or "weight", parameters_of(module)
    weight = own.get(name)
    if weight is None or is_packed(weight):
        raise TypeError(
            f"{site.path}: its weight is quantised, or computed when it is read, and takes no "
            "parametrization; run the model in a block of `with adapted(model, params)`"
        )
    W = matrix(module, own, name)
    yield module, name, _Weight(site, module, name, leaves)
    with torch.no_grad():
        bias = adapted_bias(site, W.bias, leaves.tensors(), is_stack(W))
    if bias is not None:
        beside = name_for_bias(site, own, name)
        if own[beside] is None:
            raise TypeError(
                f"{site.path}: {site.variant.name} adds a bias, and the layer has none; run the "
                "model in a block of `with adapted(model, params)`"
            )
        yield module, beside, _Bias(site, module, beside, leaves)


def _original(module: nn.Module, name: str) -> Any:
    parametrizations: Any = module.parametrizations
    return parametrizations[name].original
