"""An adapter as parametrizations of a live model, for code that needs parameters and modules."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lora_func.compat import STATE_HOOKS, children_of, parameters_of, versions_kept
from lora_func.export._parametrizations import Leaves, View, as_own, views_of
from lora_func.modules import inner_model, is_spread, shared_parameters, whole
from lora_func.runtime import Site, check_idle, check_single
from lora_func.variant import Params

_INTERRUPTS = 100
"""How many errors a removal outlives: one that always fails is no interrupt."""


class Attached:
    """An adapter that is attached to a model, and a context manager that removes it at the end.

    Attributes:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._leaves: dict[str, tuple[Leaves, str]] = {}
        self._before: list[_Before] = []
        self._required_grad = [(p, p.requires_grad) for p in model.parameters()]
        self._removed = False

    def params(self) -> Params:
        """Return the current adapter: new tensors, in the form that ``init`` gives."""
        return {
            key: whole(getattr(leaves, name)).detach().clone().requires_grad_(name[0] != "_")
            for key, (leaves, name) in self._leaves.items()
        }

    def remove(self, *, merge: bool = False) -> None:
        """Remove the adapter; the model then has its former types, names and bits.

        An interrupt is raised after the removal is complete.

        Args:
            merge: Whether the model keeps the adapted weights, written into its own parameters.

        Raises:
            ValueError: If merging would change another place of a tied weight, or the adapter has
                been removed already.
        """
        if merge and not self._before:
            raise ValueError("merge: the adapter has been removed; use lora_func.merge")
        places = [(one.module, one.name) for one in self._before] if merge else []
        merged = {place: getattr(*place).detach().clone() for place in places}
        self._check_tied(merged)
        errors: list[BaseException] = []
        while not self._removed:
            try:
                self._restore(merged)
            except BaseException as error:
                errors.append(error)
                if len(errors) > _INTERRUPTS:
                    raise
        if errors:
            raise errors[-1]

    def _restore(self, merged: Mapping[tuple[nn.Module, str], Tensor]) -> None:
        """Undo all steps; each may be repeated after an interrupt."""
        while self._before:
            self._before[-1].restore()
            del self._before[-1]
        for (module, name), tensor in merged.items():
            parameters_of(module)[name].data.copy_(tensor)
        for parameter, required in self._required_grad:
            parameter.requires_grad_(required)
        self._required_grad.clear()
        hooks = vars(self.model)[STATE_HOOKS]  # an interrupted registration returns no handle
        for number in [number for number, hook in hooks.items() if hook is _clone_tied]:
            del hooks[number]
        self._removed = True

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


class _Before(NamedTuple):
    """A module as it was before one of its parameters was parametrized.

    Attributes:
        module: The module.
        name: The parameter.
        kind: The module's class.
        own: Its parameters.
    """

    module: nn.Module
    name: str
    kind: type[nn.Module]
    own: dict[str, Any]

    def restore(self) -> None:
        """Restore the module, from any state that an interrupted registration left."""
        own, children = parameters_of(self.module), children_of(self.module)
        lists: Any = children.get("parametrizations")
        found = dict(self.own)
        if lists is not None and self.name in lists:
            found[self.name] = lists[self.name].original
        found |= {name: own[name] for name in own if name != self.name}
        own.clear()
        own.update({name: found[name] for name in self.own if name in found})
        if lists is not None:
            if self.name in lists:
                del lists[self.name]
            if not lists:
                del children["parametrizations"]
        if self.name in vars(type(self.module)):
            delattr(type(self.module), self.name)
        self.module.__class__ = self.kind


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
        TypeError: If a variant has no weight, a layer's weight is quantised or computed, or the
            model is spread over devices already; use a block of ``adapted`` then.
        ValueError: If two variants name one module, a leaf is missing, unknown or of another shape,
            or params is a stack.
        BusyModelError: If the model is running with an adapter, or has one attached.

    Examples:
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
    if any(map(is_spread, model.parameters())):
        raise TypeError(
            f"{type(model).__name__}: is spread over devices; attach the adapter before that, or "
            "run the model in a block of `with adapted(model, params)`"
        )
    layout = check_single(params, model)
    handle, grad_mode = Attached(model), torch.is_grad_enabled()
    try:
        model.register_state_dict_post_hook(_clone_tied)  # type: ignore[no-untyped-call]
        model.requires_grad_(False)
        copies = {key: as_own(key, leaf) for key, leaf in params.items()}
        with versions_kept(model.parameters()):
            _register(handle, layout.sites, copies)
        return handle
    except BaseException:
        torch.set_grad_enabled(grad_mode)  # an interrupt may leave a block of no_grad half-entered
        handle.remove()
        raise


def _register(handle: Attached, sites: Iterable[Site], params: Params) -> None:
    places, registered = shared_parameters(handle.model), set[Leaves]()
    views: list[tuple[nn.Module, str, View]] = []
    for site in sites:
        for name, kind, leaves in views_of(site, {n: params[key] for n, key in site.keys.items()}):
            handle._leaves |= {site.keys[leaf]: (leaves, leaf) for leaf in leaves.tensors()}
            here = [(site.module, name)]
            everywhere = places.get((site.module, name), here) if site.everywhere else here
            views += [(*at, kind(site, site.module, name, leaves)) for at in everywhere]
    handle._leaves = {key: handle._leaves[key] for key in params}
    for module, name, view in views:
        leaves = view.around[1]
        if leaves not in registered:  # once, so that a state dict holds each leaf once
            view.leaves = leaves
            registered.add(leaves)
        handle._before.append(_Before(module, name, type(module), {**parameters_of(module)}))
        parametrize.register_parametrization(module, name, view, unsafe=True)


def _clone_tied(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Clone what shares memory here: transformers saves shared tensors only by known names."""
    storages = Counter(t.untyped_storage() for t in state.values() if isinstance(t, Tensor))
    for name, tensor in state.items():
        inside = ".parametrizations." in f".{name}"
        if inside and storages[tensor.untyped_storage()] > 1:
            state[name] = tensor.clone()


def _original(module: nn.Module, name: str) -> Any:
    parametrizations: Any = module.parametrizations
    return parametrizations[name].original
