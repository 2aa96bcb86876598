"""Laws of derivatives."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from lora_func.testing._cases import Case, Subject
from lora_func.testing._comparison import autograd, close, loss, weighted
from lora_func.testing._law import Draw, law
from lora_func.testing._layers import random_like
from lora_func.testing._strategies import layers


@law(
    foreign=True,
    hint="the leaf is detached, multiplied by a zero, or not used; if its gradient is zero at the "
    "start by the formula, name it in `dead`; a leaf that is not trained starts with `_`",
)
def each_leaf_gets_a_gradient(case: Subject, draw: Draw) -> None:
    """``∂ apply / ∂p_i ≠ 0``: for random leaves, and at the start for those not in ``dead``."""
    for scrambled in (True, False) if case.dead is not None else (True,):
        layer = draw(layers(case, scrambled=scrambled))
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in layer.trained.items()}
        found = zip(leaves, autograd(layer, leaves), strict=True)
        zero = {name for name, gradient in found if not gradient.any()}
        expected = set() if scrambled else {*(case.dead or ())}
        where = "for random leaves" if scrambled else "at the start"
        assert zero == expected, f"no gradient {where}: {sorted(zero)}, not {sorted(expected)}"


@law(
    foreign=True,
    hint="a custom backward is wrong: compare it with autograd of the dense formula",
)
def gradients_are_those_of_finite_differences(case: Subject, draw: Draw) -> None:
    """``⟨∂f, t⟩ == (f(p + h t) - f(p - h t)) / 2h`` of ``f = apply``, for leaves and x."""
    layer = draw(layers(case, scrambled=True))
    generator = torch.Generator().manual_seed(1)
    point = {k: v for k, v in layer.trained.items() if k not in case.detached} | {"x": layer.x}
    errors, h = {}, 1e-4  # wide enough for modules that compute in float32
    for name, value in point.items():
        direction, at = random_like(value, generator), value.clone().requires_grad_()

        def f(moved: Tensor, name: str = name) -> Tensor:
            y = layer.apply(x=moved) if name == "x" else layer.apply({name: moved})
            return weighted(y)

        gradient = torch.autograd.grad(f(at), [at], materialize_grads=True)[0]
        with torch.no_grad():
            numeric = (f(value + h * direction) - f(value - h * direction)) / (2 * h)
            size = 1 + f(value).abs() + (gradient * direction).abs().sum()
            errors[name] = (((gradient * direction).sum() - numeric).abs() / size).item()
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < 1e-2, f"the gradient of {worst} is off by {errors[worst]:.1e}"


@law(hint="an operation has no rule, or a wrong one, for forward derivatives")
def directional_derivative_is_the_gradient(case: Case, draw: Draw) -> None:
    """``jvp(f, p, t) == ⟨grad(f)(p), t⟩`` of ``f(p) = apply(W, p, x)``."""
    layer = draw(layers(case, scrambled=True))
    generator = torch.Generator().manual_seed(1)
    tangents = {name: random_like(leaf, generator) for name, leaf in layer.trained.items()}

    def f(leaves: dict[str, Tensor]) -> Tensor:
        return loss(layer, leaves)

    gradients = torch.func.grad(f)(layer.trained)
    derivative = torch.func.jvp(f, (layer.trained,), (tangents,))[1]
    products = [(gradients[name] * tangents[name]).sum() for name in tangents]
    close(derivative, torch.stack(products).sum())


@law(
    applies=lambda case: not case.detached,
    foreign=True,
    hint="the backward pass of a custom autograd function uses what it saved as a constant: with "
    "gradients enabled, compute it again",
)
def double_backward_is_the_derivative_of_the_gradient(case: Subject, draw: Draw) -> None:
    """``∂ ⟨∂f/∂p, t⟩ / ∂p == (∂f/∂p (p + h t) - ∂f/∂p (p - h t)) / 2h`` of ``f = ‖apply‖²``."""
    layer = draw(layers(case, scrambled=True, dtype=torch.float64))
    generator, h = torch.Generator().manual_seed(1), 1e-5
    tangents = {name: random_like(leaf, generator) for name, leaf in layer.trained.items()}

    def gradients(step: float, create_graph: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [
            (leaf + step * tangents[name]).detach().requires_grad_()
            for name, leaf in layer.trained.items()
        ]
        y = layer.apply(dict(zip(tangents, leaves, strict=True)))
        found = torch.autograd.grad(y.square().sum(), leaves, create_graph=create_graph)
        return leaves, [*found]

    leaves, found = gradients(0.0, create_graph=True)
    along = sum((g * t).sum() for g, t in zip(found, tangents.values(), strict=True))
    assert isinstance(along, Tensor)
    second = [torch.zeros_like(leaf) for leaf in leaves]
    if along.requires_grad:
        second = [*torch.autograd.grad(along, leaves, materialize_grads=True)]
    ahead, behind = gradients(h)[1], gradients(-h)[1]
    for name, ours, after, before in zip(tangents, second, ahead, behind, strict=True):
        difference = (after - before) / (2 * h)
        size = max(difference.abs().max().item(), ours.abs().max().item(), 1.0)
        error = (ours - difference).abs().max().item()
        assert error <= 1e-4 * size, f"{name}: off by {error:.2g} at {size:.2g}"


@law(
    foreign=True,
    hint="norms and rotations need float32 on a half-precision layer; a leaf that is cast to half "
    "precision and back loses its gradient in rounding",
)
def float32_leaves_learn_on_a_half_precision_layer(case: Subject, draw: Draw) -> None:
    """On a bfloat16 or float16 layer, the gradients of float32 leaves are finite and not zero."""
    for dtype in (torch.bfloat16, torch.float16):
        layer = case.layer(scrambled=True, dtype=dtype, leaf_dtype=torch.float32)
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in layer.trained.items()}
        y = layer.apply(leaves)
        assert y.dtype == dtype, f"the output is {y.dtype} on a layer of {dtype}"
        found = torch.autograd.grad(y.float().square().sum(), [*leaves.values()])
        gradients = dict(zip(leaves, found, strict=True))
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32, f"{name}: its gradient has {gradient.dtype}"
            assert gradient.isfinite().all(), f"{name}: its gradient is not finite"
            assert gradient.any(), f"{name}: its gradient is zero"


@law(
    foreign=True,
    applies=lambda case: not case.refuses_zero_rows,
    hint="a norm is divided by without a floor, or differentiated at zero: clamp its square",
)
def zero_rows_stay_finite(case: Subject, draw: Draw) -> None:
    """With rows of zeros in W and in x, ``apply`` and its gradients are finite."""
    layer = draw(layers(case, zero_rows=True, scrambled=draw(st.booleans())))
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in layer.trained.items()}
    for x in (layer.x, torch.zeros_like(layer.x)):
        y = layer.apply(leaves, x)
        assert y.isfinite().all(), "the output is not finite"
        found = torch.autograd.grad(weighted(y), [*leaves.values()], materialize_grads=True)
        for name, gradient in zip(leaves, found, strict=True):
            assert gradient.isfinite().all(), f"{name}: its gradient is not finite"
