"""Laws of stacks of adapters."""

from collections.abc import Callable, Mapping

import torch
from hypothesis import strategies as st
from torch import Tensor

from lora_func.adapter import partition, stack, unstack
from lora_func.runtime import fcall
from lora_func.testing._cases import Case
from lora_func.testing._comparison import close, refused
from lora_func.testing._law import Draw, law
from lora_func.testing._layers import random_stack
from lora_func.testing._strategies import layers, seeds, stacks
from lora_func.variant import Params


@law(hint="`apply` branches on values, writes in place, or calls `.item()`")
def vmap_over_a_stack_is_the_loop(case: Case, draw: Draw) -> None:
    """``vmap(apply)(W, stack(p), x)[k] == apply(W, p_k, x)``."""
    found = draw(stacks(case))
    close(torch.vmap(found.layer.apply)(found.stack), found.alone())


@law(hint="name the axes of every leaf in `leaves`, by which a stack is told from one adapter")
def stack_is_refused_where_one_adapter_is_wanted(case: Case, draw: Draw) -> None:
    """``fcall(model, stack(p), x)`` is an error: its axis could be taken for that of the batch."""
    for adapters in (1, 2):
        layer = case.layer(d_in=4, d_out=4, r=1)
        _, stacked = random_stack(layer, adapters, seed=0)
        x = torch.zeros(adapters, 3, layer.W.shape[1], dtype=torch.float64)
        params = layer.with_leaves(stacked).params()
        refused("a stack goes through", lambda: fcall(layer.module, params, x))  # noqa: B023


@law(hint="a leaf is no plain tensor, or its shape depends on more than `leaves` says")
def unstack_undoes_stack(case: Case, draw: Draw) -> None:
    """``unstack(stack(p)) == p``, bit for bit."""
    layer, adapters, seed = (
        draw(layers(case, r=1, dtype=torch.float32)),
        draw(st.integers(1, 4)),
        draw(seeds),
    )
    r = layer.sizes["r"]
    made = [case.params(layer.module, r, seed=seed + i) for i in range(adapters)]
    again = unstack(stack(made))
    assert len(again) == adapters
    for one, other in zip(made, again, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def two_ranks(case: Case) -> list[int]:
    """Two ranks that a case accepts at one size of a layer."""
    return [case.fit(8, 8, r)[2] for r in (1, 3)]


def has_a_rank(case: Case) -> bool:
    """True if the config depends on the rank."""
    first, second = map(case.config, two_ranks(case))
    return first != second


@law(
    applies=has_a_rank,
    hint="zeros on the rank axes change the output, or get a gradient: leave out `pads`",
)
def mixed_ranks_train_like_their_members_or_are_refused(case: Case, draw: Draw) -> None:
    """If ``pads``, steps of AdamW on ``stack(p)`` are those on each ``p_k``; else stack refuses."""
    layer = case.layer(d_in=8, d_out=8, r=3, seed=1)
    adapters = [case.params(layer.module, r, seed=r, dtype=torch.float64) for r in two_ranks(case)]
    if not layer.variant.pads:
        refused("", lambda: stack(adapters))
        return
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, layer.W.shape[1], generator=generator, dtype=torch.float64)

    def loss(params: Mapping[str, Tensor]) -> Tensor:
        y: Tensor = fcall(layer.module, params, x)
        return (y - 1).square().sum()

    stacked = _trained(stack(adapters), lambda params: torch.vmap(loss)(params).sum())
    for one, again in zip(adapters, unstack(stacked), strict=True):
        close(again, _trained(one, loss))
    for key, leaf in stack(unstack(stacked)).items():
        assert torch.equal(leaf, stacked[key]), f"{key}: the padding has moved"


def _trained(params: Params, loss: Callable[[Params], Tensor], steps: int = 4) -> Params:
    """A copy of the leaves after some steps of AdamW."""
    leaves = {key: leaf.detach().clone() for key, leaf in params.items()}
    moving = [leaf.requires_grad_() for leaf in partition(leaves)[0].values()]
    optimizer = torch.optim.AdamW(moving, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(leaves).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {key: leaf.detach() for key, leaf in leaves.items()}
