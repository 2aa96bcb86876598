"""Laws of the start: what a fresh adapter changes, and what its first step changes."""

import torch
from hypothesis import strategies as st

from lora_func.testing._cases import Subject
from lora_func.testing._comparison import autograd, output
from lora_func.testing._law import Draw, law
from lora_func.testing._strategies import dtypes, layers
from lora_func.weights import dense


def starts_as_the_base(case: Subject) -> bool:
    """True if a fresh adapter changes nothing."""
    return case.start != "elsewhere"


@law(
    applies=starts_as_the_base,
    foreign=True,
    hint="start one factor at zero, or subtract in the forward pass what the start adds; a product "
    "with the identity is exact, a difference of two large terms is not",
)
def start_is_the_base(case: Subject, draw: Draw) -> None:
    """``apply(W, init(W), x) == x Wᵀ + b``, bit for bit, in any dtype of W and of the leaves."""
    dtype, leaf_dtype = draw(dtypes(case))
    layer = draw(layers(case, dtype=dtype, leaf_dtype=leaf_dtype))
    y, frozen = layer.apply(), layer.frozen()
    if case.start == "exact":
        assert torch.equal(y.to(frozen.dtype), frozen), (
            f"differs by {(y - frozen).abs().max().item():.1e}"
        )
    else:
        eps = max(torch.finfo(each).eps for each in (dtype, leaf_dtype))
        size = layer.x.abs().amax() * dense(layer.W).abs().sum(1)
        error = ((y - frozen).abs() / size.clamp_min(1e-9)).max().item() if y.numel() else 0.0
        assert error <= 8 * eps, f"differs by {error:.1e}"


@law(
    foreign=True,
    hint="under autocast, compute what adds to the output in the dtype of the frozen layer's "
    "output, and wrap float32 mathematics in torch.autocast(..., enabled=False)",
)
def autocast_keeps_start_and_dtype(case: Subject, draw: Draw) -> None:
    """Under autocast ``apply`` is finite, has the dtype of ``x Wᵀ + b``, and starts equal to it."""
    scrambled = draw(st.booleans())
    layer = draw(layers(case, dtype=torch.float32, scrambled=scrambled))
    with torch.autocast("cpu", torch.bfloat16):
        y, frozen = layer.apply(), layer.frozen()
    assert y.dtype == frozen.dtype == torch.bfloat16, f"the output has {y.dtype}"
    assert y.isfinite().all()
    if case.start == "exact" and not scrambled:
        assert torch.equal(y, frozen)


@law(
    applies=starts_as_the_base,
    foreign=True,
    hint="a norm of a leaf that starts at zero is divided out, so that its direction, of size one, "
    "is there at once; start that leaf away from zero, or say jumps=True",
)
def first_step_follows_the_learning_rate(case: Subject, draw: Draw) -> None:
    """One step of AdamW from ``init`` changes ``apply`` in proportion to the learning rate."""
    layer = case.layer()
    large = 1e-2 if case.jumps else 1e-4

    def moved(lr: float) -> float:
        leaves = {k: v.clone().requires_grad_() for k, v in layer.trained.items()}
        optimizer = torch.optim.AdamW(leaves.values(), lr=lr, weight_decay=0.0)
        for leaf, gradient in zip(leaves.values(), autograd(layer, leaves), strict=True):
            leaf.grad = gradient
        optimizer.step()
        with torch.no_grad():
            return float((layer.apply(leaves) - layer.apply()).norm())

    far, near = moved(large), moved(large / 10)
    assert near > 0, "the step changes nothing"
    if case.jumps:
        assert far / near < 1.5, "the case says that it jumps"
        assert near > 0.1 * output(layer).norm()
    else:
        assert 9 < far / near < 11, f"{far / near:.2f} times as far at ten times the rate"
