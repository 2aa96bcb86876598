"""Laws of ``prepare`` and ``casts``: what is computed once in a call, for all sites of a kind."""

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lora_func.testing._cases import Case
from lora_func.testing._comparison import close
from lora_func.testing._law import Draw, law
from lora_func.testing._layers import Layer
from lora_func.testing._strategies import dims, floats, seeds, stacks
from lora_func.variant import prepare_sites


def is_prepared(case: Case) -> bool:
    """True if the leaves are prepared."""
    return bool(case.variant.prepare or case.variant.casts)


def shared_leaves(layer: Layer, others: Layer) -> set[str]:
    """The constants that all sites of an adapter have in common."""
    if layer.variant.shared is None:
        return set()
    return {name for name in layer.leaves if name.startswith("_") and name in others.leaves}


HINT = (
    "`prepare` computes another thing than `apply` does without it, or takes the axis of the "
    "sites, in front, for another one"
)


@law(applies=is_prepared, hint=HINT)
def prepared_leaves_give_the_same(case: Case, draw: Draw) -> None:
    """``apply(W, prepare(p), x) == apply(W, p, x)``, with equal gradients, for several sites."""
    d_in, d_out, seed = draw(dims), draw(dims), draw(seeds)
    r = draw(st.integers(1, min(2, d_in, d_out)))
    sites = [
        case.layer(d_in, d_out, r, seed=seed + i, scrambled=True)
        for i in range(draw(st.integers(1, 3)))
    ]
    first, shared = sites[0], shared_leaves(sites[0], sites[-1])
    leaves = [
        {
            name: (first if name in shared else site)
            .leaves[name]
            .float()
            .requires_grad_(name in site.trained)
            for name in site.leaves
        }
        for site in sites
    ]
    ready = prepare_sites(first.variant, leaves, shared, first.W.shape, torch.float64)
    for site, own, prepared in zip(sites, leaves, ready, strict=True):
        trained = [leaf for leaf in own.values() if leaf.requires_grad]

        def run(given: Mapping[str, Tensor], site: Layer = site, trained: Any = trained) -> Any:
            y = site.variant.apply(site.W, given, site.x)
            return y, *torch.autograd.grad(y.double().sin().sum(), trained, retain_graph=True)

        close(run(prepared), run(own), 1e-5)


@law(applies=lambda case: is_prepared(case) and case.variant.stacks, hint=HINT)
def prepared_stack_gives_the_same(case: Case, draw: Draw) -> None:
    """``apply(W, prepare(stack(p)), x) == apply(W, stack(p), x)``."""
    found, rows = draw(stacks(case, d_in=6, d_out=5, r=2)), draw(st.integers(0, 2))
    layer = found.layer
    both = [found.stack, found.stack]
    shared = shared_leaves(layer, layer)
    ready = prepare_sites(layer.variant, both, shared, layer.W.shape, torch.float64)
    x = torch.ones(len(found.each), rows, layer.W.shape[1], dtype=torch.float64).cumsum(0)
    for leaves in ready:
        close(layer.variant.apply(layer.W, leaves, x), layer.apply(found.stack, x))


@law(
    applies=lambda case: is_prepared(case) and case.start != "elsewhere",
    hint=HINT,
)
def prepared_leaves_leave_the_start(case: Case, draw: Draw) -> None:
    """``apply(W, prepare(init(W)), x)`` starts as ``x Wᵀ + b`` in any dtype, as without it."""
    dtype = draw(floats)
    layer = case.layer(dtype=dtype, leaf_dtype=torch.float32, batch=(2, 3))
    shared = shared_leaves(layer, layer)
    both = [layer.leaves, layer.leaves]
    for ready in prepare_sites(layer.variant, both, shared, layer.W.shape, dtype):
        y, frozen = layer.variant.apply(layer.W, ready, layer.x), layer.frozen()
        assert y.dtype == dtype, f"the output has {y.dtype} on a layer of {dtype}"
        eps = max(torch.finfo(each).eps for each in (dtype, torch.float32))
        close(y, frozen, 0 if case.start == "exact" else 32 * eps)
