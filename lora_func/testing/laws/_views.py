"""Laws of the two views of an adapter: activations and weights."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from lora_func.testing._cases import Case, Subject
from lora_func.testing._comparison import close, loss, weighted
from lora_func.testing._law import Draw, law
from lora_func.testing._layers import Layer
from lora_func.testing._strategies import dtypes, layers
from lora_func.weights import Affine, dense


def has_weight(case: Subject) -> bool:
    """True if the method has a weight view."""
    return case.has_weight


@law(
    applies=has_weight,
    foreign=True,
    hint="`apply` and `weight` compute different things: look for a transposed factor, a scale in "
    "one of them alone, or a bias that the weight view scales too",
)
def weight_view_is_the_activation_view(case: Subject, draw: Draw) -> None:
    """``apply(W, p, x) == x weight(W, p)ᵀ + bias(b, p)``."""
    layer = draw(layers(case, scrambled=True))
    weight = layer.weight()
    assert weight.shape == layer.W.shape
    close(layer.apply(), F.linear(layer.x, weight, layer.bias))


@law(
    foreign=True,
    hint="a leaf, or a constant of another dtype, promotes the output: cast leaves to the dtype of "
    "x where they meet it",
)
def output_has_the_dtype_of_the_layer(case: Subject, draw: Draw) -> None:
    """``apply(W, p, x).dtype == (x Wᵀ).dtype``, and so is ``weight``'s, for leaves of any dtype."""
    dtype, leaf_dtype = draw(dtypes(case))
    layer = draw(layers(case, dtype=dtype, leaf_dtype=leaf_dtype, scrambled=True))
    found = layer.apply().dtype
    assert found == dtype, f"the output is {found} on a layer of {dtype}"
    assert layer.weight().dtype == dtype, "the weight view changes the dtype"


class View(nn.Module):
    """A parametrization: a function of the frozen parameter."""

    def __init__(self, view: Callable[[Any], Any]) -> None:
        super().__init__()
        self.view = view

    def forward(self, frozen: Tensor) -> Any:
        """Return the adapted parameter."""
        return self.view(frozen)


@law(applies=has_weight, hint="`weight` needs more of W than its values")
def parametrized_layer_is_the_same(case: Case, draw: Draw) -> None:
    """``torch.nn.utils.parametrize`` with ``weight`` and ``bias`` computes what ``apply`` does."""
    layer = draw(layers(case, scrambled=True, bias=True))
    expected, bias = layer.apply(), layer.variant.bias
    register_parametrization(layer.module, "weight", View(layer.weight))
    if bias is not None and layer.module.bias is not None:
        register_parametrization(layer.module, "bias", View(lambda b: bias(b, layer.leaves)))
        close(expected, layer.module(layer.x))
    else:
        close(expected, F.linear(layer.x, layer.module.weight, layer.bias))


@law(hint="read the bias through `linear(x, W)`, and the weight through `dense(W)`")
def bare_weight_is_a_layer_without_bias(case: Case, draw: Draw) -> None:
    """``apply(W, p, x) == apply(Affine(W), p, x)``, and so for ``weight``."""
    layer = draw(layers(case, scrambled=True))
    bare, without_bias = dense(layer.W), Affine(dense(layer.W))
    for view in (lambda W: layer.variant.apply(W, layer.leaves, layer.x), layer.weight):
        close(view(bare), view(without_bias))


@law(
    applies=has_weight,
    foreign=True,
    hint="a method that is not linear in x has no weight view: leave `weight` out",
)
def layer_is_affine_in_x(case: Subject, draw: Draw) -> None:
    """``f(s x + (1 - s) z) == s f(x) + (1 - s) f(z)`` of ``f(x) = apply(W, p, x)``."""
    layer, share = draw(layers(case, scrambled=True)), draw(st.floats(-2, 2))
    other = layer.x.flip(-1) + 1
    mixed = layer.apply(x=share * layer.x + (1 - share) * other)
    close(mixed, share * layer.apply() + (1 - share) * layer.apply(x=other))


@law(
    foreign=True,
    hint="take the last axis of x alone as the width: `x @ A.mT`, never `x.view(n, d)` or `A @ x`",
)
def any_batch_shape_is_the_same_rows(case: Subject, draw: Draw) -> None:
    """``apply(W, p, x)[i, j] == apply(W, p, x[i, j])``, for no rows, and for any strides of x."""
    tokens = draw(st.integers(0, 3))
    layer = draw(layers(case, scrambled=True, batch=(tokens, 4)))
    rows = layer.apply(x=layer.x.flatten(0, 1))
    assert rows.shape == (tokens * 4, layer.W.shape[0])
    close(layer.apply(), rows.reshape(tokens, 4, rows.shape[-1]))
    close(layer.apply(x=layer.x.mT.contiguous().mT), layer.apply())
    if tokens:
        close(layer.apply(x=layer.x[0, 0]), layer.apply()[0, 0])


@law(applies=has_weight, hint="a detached tensor, or a custom backward, in one of the two views")
def gradients_are_those_of_the_weight_view(case: Case, draw: Draw) -> None:
    """``∂ apply(W, p, x) / ∂p == ∂ (x weight(W, p)ᵀ + bias(b, p)) / ∂p``."""
    layer = draw(layers(case, scrambled=True))

    def from_weights(leaves: dict[str, Tensor]) -> Tensor:
        moved: Layer = layer.with_leaves(leaves)
        return weighted(F.linear(layer.x, moved.weight(), moved.bias))

    found = torch.func.grad(lambda leaves: loss(layer, leaves))(layer.trained)
    close(found, torch.func.grad(from_weights)(layer.trained))
