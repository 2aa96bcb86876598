"""Laws of what a ``Variant`` says about itself in its other fields."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from lora_func.compat import TorchDispatchMode, tree_leaves
from lora_func.runtime import Operand
from lora_func.testing._cases import Case
from lora_func.testing._comparison import close
from lora_func.testing._law import Draw, law
from lora_func.testing._layers import random_stack
from lora_func.testing._strategies import layers, stacks
from lora_func.weights import dense


@law(
    applies=lambda case: case.variant.leaves,
    hint="`leaves` names the axes of every leaf that `init` makes, constants too, and of no other; "
    'a leaf that may be missing ends with "?"',
)
def leaves_have_the_axes_that_they_name(case: Case, draw: Draw) -> None:
    """``init(W).keys() == leaves.keys()``; the shapes fit one choice of sizes for the axes."""
    layer = draw(layers(case))  # `init` checks the shapes
    missing = sorted(layer.variant.required - layer.leaves.keys())
    assert not missing, f"`leaves` names {missing}, which `init` does not make"


@law(
    applies=lambda case: case.variant.products_only,
    hint="`apply` uses x for more than `linear(x, W)`, `x @ M` and `dropout(x, rate)`: leave out "
    "`products_only`",
)
def products_with_x_are_all_that_apply_needs(case: Case, draw: Draw) -> None:
    """``apply`` reads nothing of x but its dtype and the products ``x Mᵀ``."""
    layer = draw(layers(case, scrambled=True))
    rows = Operand(
        layer.W.shape[1],
        layer.x.dtype,
        lambda M, bias: F.linear(layer.x, M, bias),
        lambda rate: rows,
    )
    close(layer.apply(x=rows), layer.apply())


@law(
    applies=lambda case: case.variant.delta_norm,
    hint="`delta_norm` forgets a scale, or measures a factor in place of the product",
)
def norm_is_that_of_the_change(case: Case, draw: Draw) -> None:
    """``delta_norm(p) == ‖weight(W, p) - W‖``, for a stack of leaves too."""
    layer, seed = draw(layers(case, scrambled=True)), draw(st.integers(0, 9))
    norm = layer.variant.delta_norm
    assert norm is not None
    close(norm(layer.leaves, layer.W.shape), (layer.weight() - dense(layer.W)).norm(), 1e-6)
    each, stacked = random_stack(layer, 3, seed)
    alone = [norm(leaves, layer.W.shape) for leaves in each]
    close(norm(stacked, layer.W.shape), torch.stack([one for one in alone if one is not None]))


@law(applies=lambda case: case.variant.low_rank, hint="`low_rank` forgets a scale or a sign")
def factors_multiply_to_the_change(case: Case, draw: Draw) -> None:
    """``Σ B A == weight(W, p) - W`` over the pairs of ``low_rank(p)``."""
    layer = draw(layers(case, scrambled=True))
    assert layer.variant.low_rank is not None
    products = [B @ A for A, B in layer.variant.low_rank(layer.leaves)]
    close(torch.stack(products).sum(0), layer.weight() - dense(layer.W))


@law(
    applies=lambda case: case.variant.neutral,
    hint="a product of two trained leaves is not linear in them: leave out `neutral`",
)
def change_is_linear_around_the_neutral_leaves(case: Case, draw: Draw) -> None:
    """``f(n + s (p - n)) == x Wᵀ + b + s (f(p) - x Wᵀ - b)`` of ``f = apply`` and ``neutral`` n."""
    layer, share = draw(layers(case, scrambled=True)), draw(st.floats(-2, 2))
    neutral = layer.variant.neutral
    assert neutral is not None
    assert neutral.keys() == layer.trained.keys(), "`neutral` names other leaves"

    def output_of(share: float) -> Tensor:
        return layer.apply({k: at + share * (layer.leaves[k] - at) for k, at in neutral.items()})

    nothing, all_ = output_of(0.0), output_of(1.0)
    close(nothing, F.linear(layer.x, dense(layer.W), layer.W.bias))
    close(output_of(share), nothing + share * (all_ - nothing))


@law(
    applies=lambda case: case.variant.project,
    hint="`project` changes what is in its bounds, or a constant, or mixes the adapters of a stack",
)
def bounds_keep_what_is_inside_of_them(case: Case, draw: Draw) -> None:
    """``project(project(p)) == project(p)``; the start stays; a stack is bounded one by one."""
    project = case.variant.project
    assert project is not None
    start, layer = draw(layers(case)), draw(layers(case, scrambled=True))
    for leaf, tensor in project(start.leaves).items():
        assert torch.equal(tensor, start.leaves[leaf]), f"{leaf} of the start is out of its bounds"
    moved = project(layer.leaves)
    assert moved.keys() <= layer.trained.keys()
    again = project({**layer.leaves, **moved})
    for leaf, tensor in moved.items():
        close(again[leaf], tensor)
    each, stacked = random_stack(layer, 3, draw(st.integers(0, 9)))
    for leaf, tensor in project(stacked).items():
        close(tensor, torch.stack([project(leaves)[leaf] for leaves in each]))


class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the number of elements of the largest new tensor; views are not counted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        old = {t.untyped_storage().data_ptr() for t in given}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in old:
                self.largest = max(self.largest, tensor.numel())
        return result


@law(hint="`apply` forms the dense change: reorder the products; or say `builds_dense`")
def no_matrix_of_the_size_of_the_weight_is_built(case: Case, draw: Draw) -> None:
    """``apply`` allocates d_out d_in numbers at once if and only if it ``builds_dense``."""
    layer = case.layer(d_in=40, d_out=40, scrambled=True)
    with Sizes() as sizes:
        layer.apply()
    builds = sizes.largest >= min(layer.W.shape) ** 2
    assert builds == layer.variant.builds_dense, f"it allocates {sizes.largest} numbers at once"


@law(
    applies=lambda case: case.variant.stacks,
    hint="`apply` reduces or transposes a leading axis: use `.mT` and `[..., None, :]`, "
    "or leave out `stacks`",
)
def apply_takes_a_stack(case: Case, draw: Draw) -> None:
    """``apply(W, stack(p), x)[k] == apply(W, p_k, x_k)`` for x (K, n, d_in)."""
    found, rows, seed = draw(stacks(case)), draw(st.integers(0, 3)), draw(st.integers(0, 9))
    adapters = len(found.each)
    for leaf in (name for name, stacked in found.stack.items() if stacked.ndim == 1):
        found.stack[leaf] = found.stack[leaf] * torch.linspace(0.5, 1, adapters)
        for own, number in zip(found.each, found.stack[leaf], strict=True):
            own[leaf] = number
    generator = torch.Generator().manual_seed(seed)
    width = found.layer.W.shape[1]
    x = torch.randn(adapters, rows, width, generator=generator, dtype=torch.float64)
    close(found.layer.apply(found.stack, x), found.alone(x))
