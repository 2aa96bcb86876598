"""Putting an adapter into a live model for the length of a call, and taking it out again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_func._modules import forward_slot, identities, uncompiled
from lora_func._plan import Plan, Site, plan_of
from lora_func._running import Run, refuse_others, running
from lora_func._slots import Put, Slot
from lora_func._transforms import environment
from lora_func._weight import affine


class _Watched(dict[str, Tensor]):
    """A dict that strikes what is read from it off a list."""

    __slots__ = ("_keys", "_unused")

    def __init__(
        self, values: Mapping[str, Tensor], keys: Mapping[str, str], unused: set[str]
    ) -> None:
        super().__init__(values)
        self._keys = keys
        self._unused = unused

    def __getitem__(self, name: str) -> Tensor:
        self._unused.discard(self._keys.get(name, ""))
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._unused.discard(self._keys.get(name, ""))
        return super().get(name, default)

    def __reduce__(self) -> tuple[type[dict[str, Tensor]], tuple[dict[str, Tensor]]]:
        return dict, (dict(self),)


@contextmanager
def injected(model: nn.Module, params: Mapping[str, Tensor]) -> Iterator[set[str]]:
    """Put an adapter into a model; afterwards the model is what it was, whatever happened.

    Args:
        model: The model.
        params: The adapter.

    Yields:
        The keys that nothing has read yet; while compiling always none.

    Raises:
        KeyError: If a key names no module of the model or no variant.
        TypeError: If a variant cannot adapt the module that a key names.
        ValueError: If two variants name one module, or a leaf has not its parameter's shape.
        RuntimeError: If activation checkpointing is on.
        BusyModelError: If the model is already running with an adapter.
    """
    plan = plan_of(uncompiled(model), params)
    if torch.compiler.is_compiling():
        with Put(slot for site in plan.sites for slot in _slots(site, params, None)):
            yield set()
        return
    _refuse_checkpointing(plan)
    unused = {key for site in plan.sites for key in site.keys.values()}
    with environment(plan.fast_path), Put(_all_slots(plan, params, unused)):
        yield unused


def _all_slots(plan: Plan, params: Mapping[str, Tensor], unused: set[str]) -> Iterator[Slot]:
    mine = object()
    sites = frozenset(id(site.module()) for site in plan.sites)
    yield running, mine, Run(sites, identities(plan.structure))
    refuse_others(mine)
    for site in plan.sites:
        yield from _slots(site, params, unused)


def _slots(site: Site, params: Mapping[str, Tensor], unused: set[str] | None) -> Iterator[Slot]:
    """What to write where for one site; with a set to strike the keys off that are read."""
    module = site.module()
    assert module is not None
    leaves = {
        leaf: params[key].detach() if leaf.startswith("_") else params[key]
        for leaf, key in site.keys.items()
    }
    if site.variant.parameters is not None:
        own: dict[str, Any] = module._parameters
        replaced = site.variant.parameters(own, leaves)
        _refuse_other_shapes(site, own, replaced)
        if unused is None:
            yield from ((own, name, tensor) for name, tensor in replaced.items())
        else:
            yield module.__dict__, "_parameters", _Watched(own | replaced, site.keys, unused)
        return
    if unused is not None:
        leaves = _Watched(leaves, site.keys, unused)
    yield module.__dict__, _slot_name(module, site), _adapted_forward(module, site, leaves)


def _adapted_forward(
    module: nn.Module, site: Site, leaves: Mapping[str, Tensor]
) -> Callable[[Tensor], Tensor]:
    apply = site.variant.apply

    def forward(input: Tensor) -> Tensor:
        try:
            return apply(affine(module), leaves, input)
        except Exception as error:
            error.add_note(f"in the {site.variant.name} adapter of {site.path!r}")
            raise

    return forward


def _slot_name(module: nn.Module, site: Site) -> str:
    slot = forward_slot(module)
    if slot == "forward" and slot in module.__dict__:
        raise TypeError(
            f"{site.path}: its forward was replaced on the instance, by "
            f"{module.__dict__['forward']!r}, which {site.variant.name} would bypass; remove that, "
            "or leave the site out of the adapter"
        )
    return slot


def _refuse_other_shapes(
    site: Site, own: Mapping[str, Tensor], replaced: Mapping[str, Tensor]
) -> None:
    for name, tensor in replaced.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{site.keys[name]}: got shape {tuple(tensor.shape)}, the parameter has "
                f"{tuple(own[name].shape)}; a stack of adapters goes through torch.vmap"
            )


def _refuse_checkpointing(plan: Plan) -> None:
    if not torch.is_grad_enabled():
        return
    for reference in plan.checkpointing:
        module = reference()
        if module is not None and module.gradient_checkpointing and module.training:
            raise RuntimeError(
                f"{type(module).__name__}: activation checkpointing is on, and would recompute the "
                "layer without its adapter; call model.activation_checkpointing_disable() first"
            )
