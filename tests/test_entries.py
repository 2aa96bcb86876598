"""Sparse entries added to a frozen layer: equal to the dense form, no dense matrix in memory."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.testing import dims, seeds
from lora_func.variants import by_name
from lora_func.weights import Affine
from tests.support.cases import Made

WIDE = 50


def add_entries(x, W, values, indices):
    return by_name("shira").apply(W, {"values": values, "_indices": indices}, x)


def dense_form(x, W, values, indices):
    """The reference, with the dense matrix D."""
    index = indices.unbind(-2)
    if values.ndim == 2:
        index = (torch.arange(len(values))[:, None], *index)
    D = values.new_zeros(*values.shape[:-1], *W.shape).index_put(index, values)
    return F.linear(x, W.weight, W.bias) + x @ D.mT


def entries(g, shape, adapters):
    """The indices of half of a matrix's entries, in random order."""
    d_out, d_in = shape
    flat = torch.stack(
        [torch.randperm(d_out * d_in, generator=g) for _ in range(max(adapters, 1))]
    )[:, : (d_out * d_in + 1) // 2]
    indices = torch.stack([flat // d_in, flat % d_in], -2)
    return indices if adapters else indices[0]


@given(
    rows=st.integers(0, 3),
    d_in=dims,
    d_out=dims,
    bias=st.booleans(),
    adapters=st.integers(0, 2),
    seed=seeds,
)
def test_the_derivatives_are_the_dense_forms(rows, d_in, d_out, bias, adapters, seed):
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    indices = entries(g, (d_out, d_in), adapters)
    W = Affine(random(d_out, d_in), random(d_out) if bias else None)
    leaves = random(adapters or 2, rows, d_in), random(*indices[..., 0, :].shape)
    found = []
    for form in (add_entries, dense_form):
        x, values = (leaf.clone().requires_grad_() for leaf in leaves)
        y = form(x, W, values, indices)
        first = torch.autograd.grad(y.sin().sum(), (x, values), retain_graph=True)
        again = torch.autograd.grad(y.sin().sum(), (x, values), create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in again), (x, values))
        found.append((y, *first, *again, *second))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_more_precise_than_the_weight_are_not_rounded_to_it(dtype):
    W, x = torch.full((8, 8), 1000.0, dtype=dtype), torch.eye(8, dtype=dtype)
    indices = torch.arange(8).expand(2, 8)
    values = torch.full((8,), 2.0**-12, requires_grad=True)
    y = add_entries(x - x, W, values, indices) + add_entries(x, W * 0, values, indices)
    assert y.diagonal().eq(2.0**-12).all()
    add_entries(x, W, values, indices).sum().backward()
    assert values.grad.dtype == torch.float32
    assert values.grad.eq(1).all()


def test_a_stack_builds_no_matrix_and_one_adapter_keeps_none():
    layer = nn.Linear(WIDE, WIDE).requires_grad_(False)
    adapters = [lf.init(layer, lf.SHiRA(r=1), seed=seed) for seed in range(3)]
    stack = lf.stack(adapters)
    x = torch.randn(2, WIDE)
    lf.vcall(layer, stack, x)  # the first vcall also runs each adapter alone as a check
    with Made(layer.weight) as made:
        lf.vcall(layer, stack, x, loss_fn=lambda y, _: y.square().mean()).sum().backward()
    assert max(made.sizes) < WIDE * WIDE
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lf.fcall(layer, adapters[0], x).sum().backward()
    assert all(t is layer.weight or t.numel() < WIDE * WIDE for t in kept)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("adapters", [0, 2])
def test_training_on_a_gpu(dtype, adapters):
    g = torch.Generator().manual_seed(0)
    indices = entries(g, (12, 16), adapters).cuda()
    W = Affine(torch.randn(12, 16, dtype=dtype).cuda(), torch.randn(12, dtype=dtype).cuda())
    x = torch.randn(*[2] * (adapters > 0), 5, 16, dtype=dtype).cuda()
    values = torch.randn(indices.shape[:-2] + indices.shape[-1:]).cuda().requires_grad_()

    def gradient(form, W, x):
        return torch.autograd.grad(form(x, W, values, indices).square().sum(), values)[0]

    expected = gradient(dense_form, Affine(W.weight.float(), W.bias.float()), x.float())
    off = (gradient(add_entries, W, x).float() - expected).norm() / expected.norm()
    assert off < 10 * torch.finfo(dtype).eps
