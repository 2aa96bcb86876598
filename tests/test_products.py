"""Low-rank products added to a frozen layer: equal results, no dense matrix in memory."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

import lora_func as lf
from lora_func.numerics import add_low_rank, add_scaled, along_rows, cayley, skew
from lora_func.testing import dims, seeds
from lora_func.weights import Affine
from tests.support.cases import Made


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def random(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def plain(x, W, down, up, middle=None, gain=None, bottleneck=lambda h: h):
    h = x @ down.mT if middle is None else (x @ down.mT) * along_rows(middle)
    added = bottleneck(h) @ up.mT
    return F.linear(x, W.weight, W.bias) + (added if gain is None else along_rows(gain) * added)


@given(
    rows=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    d_in=dims,
    d_out=dims,
    bias=st.booleans(),
    stack=st.booleans(),
    steered=st.booleans(),
    factors=st.sets(st.sampled_from(["middle", "gain"])),
    seed=seeds,
)
def test_the_fused_form_has_the_plain_forms_derivatives(
    rows, d_in, d_out, bias, stack, steered, factors, seed
):
    g = torch.Generator().manual_seed(seed)
    front = (2,) if stack else ()
    rows = [2, sum(rows)] if stack else rows
    W = Affine(random(g, d_out, d_in), random(g, d_out) if bias else None)
    leaves = {"x": random(g, *rows, d_in), "down": random(g, *front, 3, d_in)}
    leaves["up"] = random(g, *front, d_out, 3)
    leaves |= {name: random(g, *front, {"middle": 3, "gain": d_out}[name]) for name in factors}
    options = {"bottleneck": torch.sin} if steered else {}
    found = []
    for form in (add_low_rank, plain):
        own = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        y = form(W=W, **own, **options)
        again = torch.autograd.grad(y.sin().sum(), [*own.values()], retain_graph=True)
        first = torch.autograd.grad(y.sin().sum(), [*own.values()], create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), [*own.values()])
        found.append((y, *again, *first, *second))
    for ours, expected in zip(*found, strict=True):
        close(ours, expected)


@given(
    rows=st.integers(0, 3),
    d=dims,
    stack=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=seeds,
)
def test_a_scaled_copy_has_the_plain_forms_derivatives(rows, d, stack, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    leaves = random(g, 2, rows, d).to(dtype), random(g, *((2, d) if stack else (d,)))
    found = []
    for form in (add_scaled, lambda y, more: y + y * along_rows(more).to(y.dtype)):
        y, more = (leaf.clone().requires_grad_() for leaf in leaves)
        out = form(y, more)
        first = torch.autograd.grad(out.sin().sum(), (y, more), retain_graph=True)
        again = torch.autograd.grad(out.sin().sum(), (y, more), create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in again), (y, more))
        found.append((out, *first, *again, *second))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_a_gain_more_precise_than_the_output_is_not_rounded_to_its_dtype():
    y, gain = torch.full((2, 3), 1.5, dtype=torch.bfloat16), torch.full((3,), 1 + 3 * 2.0**-9)
    assert add_scaled(y, gain - 1).eq(1.5078125).all()
    assert (y * gain.bfloat16()).eq(1.515625).all()
    assert torch.equal(add_scaled(y, torch.zeros(3)), y)


@pytest.mark.parametrize("cfg", [lf.LoRA(r=2), lf.PiSSA(r=2), lf.DeLoRA(r=2)], ids=repr)
def test_a_step_makes_nothing_wide_beside_the_output_and_the_gradient(cfg):
    layer, rows = nn.Linear(50, 70).requires_grad_(False), 40
    params, x = lf.init(layer, cfg), torch.randn(rows, 50, requires_grad=True)
    with Made() as made:
        loss = lf.fcall(layer, params, x, loss_fn=lambda y, _: y[0, 0])
        assert made.sizes.count(rows * 70) == 1
    y = lf.fcall(layer, params, x)
    gradient = torch.ones_like(y)
    with Made(gradient) as made:
        torch.autograd.grad(y, [x, *lf.partition(params)[0].values()], gradient)
        assert made.sizes.count(rows * 50) == 1
        assert rows * 70 not in made.sizes
    assert loss.requires_grad


def test_the_output_may_be_written_into():
    layer = nn.Linear(3, 3).requires_grad_(False)
    params, x = lf.init(layer, lf.LoRA(r=2)), torch.randn(2, 4, 3)

    def ours(y, _):
        return y.mul_(2).relu_().sum()

    lf.fcall(layer, params, x, loss_fn=ours).backward()
    assert params[".lora.B"].grad is not None


@pytest.mark.parametrize(
    "cfg", [lf.LoRA(r=2), lf.DoRA(r=2), lf.HRA(r=2)], ids=lambda cfg: cfg.variant
)
def test_shapes_are_found_without_memory(cfg):
    layer = nn.Linear(4, 3).requires_grad_(False)
    params = {key: leaf.to("meta") for key, leaf in lf.init(layer, cfg).items()}
    y = lf.fcall(layer.to("meta"), params, torch.ones(2, 4, device="meta"))
    assert (y.device.type, y.shape) == ("meta", (2, 3))


def test_a_layer_that_is_not_frozen_gets_its_gradient():
    layer = nn.Linear(3, 4)
    with lf.adapted(layer, lf.init(layer, lf.LoRA(r=2))):
        layer(torch.ones(2, 3)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None


@given(blocks=st.integers(1, 2), size=st.integers(2, 4), seed=seeds)
def test_the_derivatives_of_cayley_are_those_of_the_solve(blocks, size, seed):
    g = torch.Generator().manual_seed(seed)
    upper = random(g, blocks, size * (size - 1) // 2).requires_grad_()

    def rotation(upper):
        return cayley(skew(upper))

    def solved(upper):
        X = skew(upper)
        return torch.linalg.solve(torch.eye(size, dtype=X.dtype) - X, 2 * X)

    close(rotation(upper), solved(upper))
    reverse, forward = torch.func.jacrev, torch.func.jacfwd
    for derivative in (reverse, forward):
        close(derivative(rotation)(upper), reverse(solved)(upper))
    # torch.linalg.solve has wrong second derivatives in forward mode
    twice = reverse(reverse(solved))(upper)
    for outer in (reverse, forward):
        for inner in (reverse, forward):
            close(outer(inner(rotation))(upper), twice)
    assert torch.autograd.gradgradcheck(rotation, upper)


def test_the_losses_of_a_sweep_make_one_gradient_of_the_logits():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 500).requires_grad_(False)

        def forward(self, x, labels):
            logits = self.head(x)
            loss = F.cross_entropy(logits, labels)
            return CausalLMOutput(loss=loss, logits=logits)

    model, adapters = Model(), 8
    stacked = lf.stack([lf.init(model, lf.LoRA(r=1), seed=seed) for seed in range(adapters)])
    batch = {"x": torch.randn(2, 3), "labels": torch.tensor([3, 4])}
    for loss_fn in (None, lambda output, batch: F.cross_entropy(output.logits, batch["labels"])):
        losses = lf.vcall(model, stacked, batch, loss_fn=loss_fn, check="never")
        with Made() as made:
            losses.sum().backward()
        # one for log_softmax and one for the joined rows; none per adapter
        assert made.sizes.count(adapters * 2 * 500) <= 2
