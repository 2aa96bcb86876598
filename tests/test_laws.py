"""Every law on every case, in float64 by default."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import is_tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_func as lf
from lora_func.runtime._operands import Operand
from lora_func.weights import Affine, dense
from tests.support.cases import CASES, Layers, make_layer, make_params, random_like, scrambled_stack
from tests.support.strategies import dims, layers, seeds

LINEAR = [case for case in CASES if case.has_weight]

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=repr)
EACH_LINEAR_CASE = pytest.mark.parametrize("case", LINEAR, ids=repr)
EACH_START = pytest.mark.parametrize(
    "case", [case for case in CASES if case.start != "elsewhere"], ids=repr
)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def output(layer):
    """A scalar function of the trained leaves that depends on every leaf."""
    weights = torch.linspace(-1, 2, layer.apply().numel(), dtype=torch.float64)
    return lambda leaves: (layer.apply(leaves).flatten() * weights).sum()


@EACH_START
@given(data=st.data(), dtype=st.sampled_from(FLOATS), leaf_dtype=st.sampled_from(FLOATS))
def test_the_start_is_the_frozen_layer_bit_for_bit(case, data, dtype, leaf_dtype):
    if not case.is_adapter:  # a copy is exact if its dtype is at least as wide
        leaf_dtype = torch.promote_types(dtype, leaf_dtype)
    layer = data.draw(layers(case, dtype=dtype, leaf_dtype=leaf_dtype))
    y, frozen = layer.apply(), layer.module(layer.x)
    assert y.dtype == dtype
    if case.start == "exact":
        assert torch.equal(y, frozen)
    else:
        size = layer.x.abs().amax() * dense(layer.W).abs().sum(1)
        assert ((y - frozen).abs() <= 8 * torch.finfo(dtype).eps * size).all()


@EACH_CASE
@given(data=st.data(), scrambled=st.booleans())
def test_autocast_leaves_the_start_and_the_dtype_of_the_output(case, data, scrambled):
    layer = data.draw(layers(case, dtype=torch.float32, scrambled=scrambled))
    with torch.autocast("cpu", torch.bfloat16):
        y, frozen = layer.apply(), layer.module(layer.x)
    assert y.dtype == frozen.dtype == torch.bfloat16
    assert y.isfinite().all()
    if case.start == "exact" and not scrambled:
        assert torch.equal(y, frozen)


@EACH_CASE
@given(data=st.data(), dtype=st.sampled_from(FLOATS), leaf_dtype=st.sampled_from(FLOATS))
def test_the_views_take_leaves_of_any_dtype(case, data, dtype, leaf_dtype):
    if not case.is_adapter:
        leaf_dtype = torch.promote_types(dtype, leaf_dtype)
    layer = data.draw(layers(case, dtype=dtype, leaf_dtype=leaf_dtype, scrambled=True))
    assert layer.apply().dtype == dtype
    assert layer.weight(layer.W).dtype == dtype


@EACH_LINEAR_CASE
@given(data=st.data())
def test_activation_view_equals_weight_view(case, data):
    layer = data.draw(layers(case, scrambled=True))
    weight = layer.variant.weight(layer.W, layer.leaves)
    close(layer.apply(), F.linear(layer.x, weight, layer.bias))
    assert weight.dtype == dense(layer.W).dtype
    assert weight.shape == layer.W.shape


@pytest.mark.parametrize("case", [c for c in CASES if c.variant.products_only], ids=repr)
@given(data=st.data())
def test_products_with_x_are_all_that_apply_needs(case, data):
    layer = data.draw(layers(case, scrambled=True))
    x = Operand(
        layer.W.shape[1], layer.x.dtype, lambda M, bias: F.linear(layer.x, M, bias), lambda rate: x
    )
    close(layer.apply(x=x), layer.apply())


class View(nn.Module):
    def __init__(self, view):
        super().__init__()
        self.view = view

    def forward(self, frozen):
        return self.view(frozen)


@pytest.mark.parametrize("case", [c for c in CASES if c.variant.delta_norm], ids=repr)
@given(data=st.data())
def test_the_norm_of_the_change(case, data):
    layer = data.draw(layers(case, scrambled=True))
    change = layer.weight(layer.W) - dense(layer.W)
    torch.testing.assert_close(
        layer.variant.delta_norm(layer.leaves, layer.W.shape), change.norm(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("case", [c for c in CASES if c.variant.delta_norm], ids=repr)
def test_the_norm_of_a_stack_is_that_of_each_member(case):
    layer = make_layer(case, scrambled=True)
    many, stacked = scrambled_stack(layer, 3, seed=0)
    norms = [layer.variant.delta_norm(leaves, layer.W.shape) for leaves in many]
    close(layer.variant.delta_norm(stacked, layer.W.shape), torch.stack(norms))


@pytest.mark.parametrize("case", [c for c in CASES if c.variant.low_rank], ids=repr)
@given(data=st.data())
def test_the_factors_multiply_to_the_change(case, data):
    layer = data.draw(layers(case, scrambled=True))
    change = layer.weight(layer.W) - dense(layer.W)
    close(sum(B @ A for A, B in layer.variant.low_rank(layer.leaves)), change)


@pytest.mark.parametrize("case", [c for c in CASES if c.variant.neutral], ids=repr)
@given(data=st.data(), share=st.floats(-2, 2))
def test_the_change_is_linear_around_its_neutral_leaves(case, data, share):
    layer = data.draw(layers(case, scrambled=True))
    neutral = layer.variant.neutral
    assert neutral.keys() == layer.trained.keys()

    def output_of(share):
        moved = {k: at + share * (layer.leaves[k] - at) for k, at in neutral.items()}
        return layer.apply(moved)

    nothing, all_ = output_of(0.0), output_of(1.0)
    close(nothing, F.linear(layer.x, dense(layer.W), layer.W.bias))
    close(output_of(share), nothing + share * (all_ - nothing))


@EACH_LINEAR_CASE
@given(data=st.data())
def test_parametrizing_the_weight_is_the_same_layer(case, data):
    layer = data.draw(layers(case, scrambled=True, bias=True))
    expected = layer.apply()
    weight, bias = layer.variant.weight, layer.variant.bias
    register_parametrization(layer.module, "weight", View(lambda W: weight(W, layer.leaves)))
    if bias is not None and layer.module.bias is not None:
        register_parametrization(layer.module, "bias", View(lambda b: bias(b, layer.leaves)))
        close(expected, layer.module(layer.x))
    else:
        close(expected, F.linear(layer.x, layer.module.weight, layer.bias))


@EACH_CASE
@given(data=st.data())
def test_a_bare_weight_is_a_layer_without_bias(case, data):
    layer = data.draw(layers(case, scrambled=True))
    bare, without_bias = dense(layer.W), Affine(dense(layer.W))
    for view in (lambda W: layer.variant.apply(W, layer.leaves, layer.x), layer.weight):
        close(view(bare), view(without_bias))


@EACH_CASE
@given(d_in=dims, d_out=dims, seed=seeds, adapters=st.integers(1, 4))
def test_vmap_over_a_stack_equals_the_loop(case, d_in, d_out, seed, adapters):
    layer = make_layer(case, d_in, d_out, r=1, seed=seed, scrambled=True)
    many, stacked = scrambled_stack(layer, adapters, seed)
    close(torch.vmap(layer.apply)(stacked), torch.stack([layer.apply(leaves) for leaves in many]))


@EACH_CASE
@pytest.mark.parametrize("adapters", [1, 2])
def test_a_stack_is_refused_where_one_adapter_is_wanted(case, adapters):
    """The stack axis could be mistaken for the batch axis."""
    layer = make_layer(case, d_in=4, d_out=4, r=1)
    _, stacked = scrambled_stack(layer, adapters, seed=0)
    x = torch.randn(adapters, 3, layer.W.shape[1], dtype=torch.float64)
    params = {f".{layer.variant.name}.{name}": leaf for name, leaf in stacked.items()}
    with pytest.raises(ValueError, match="a stack goes through"):
        lf.fcall(layer.module, params, x)


@EACH_CASE
@given(data=st.data())
def test_nothing_that_goes_in_is_written_to(case, data):
    layer = data.draw(layers(case, scrambled=True))
    inputs = [*layer.leaves.values(), layer.x, *(t for t in layer.W[:2] if t is not None)]
    before = [tensor.clone() for tensor in inputs]
    versions = [tensor._version for tensor in inputs]
    random_state = torch.get_rng_state()
    layer.apply()
    layer.weight(layer.W)
    make_params(case, layer.module, layer.r, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert [tensor._version for tensor in inputs] == versions
    assert torch.equal(torch.get_rng_state(), random_state)


@EACH_CASE
@given(data=st.data(), scrambled=st.booleans())
def test_each_leaf_gets_a_gradient_where_the_mathematics_says_so(case, data, scrambled):
    layer = data.draw(layers(case, scrambled=scrambled))
    gradients = torch.func.grad(output(layer))(layer.trained)
    zero = {name for name, gradient in gradients.items() if not gradient.any()}
    assert zero == (set() if scrambled else case.dead)


@EACH_LINEAR_CASE
@given(data=st.data())
def test_gradients_equal_those_of_the_weight_view(case, data):
    layer = data.draw(layers(case, scrambled=True))

    def from_weights(leaves):
        moved = replace(layer, leaves=layer.leaves | leaves)
        y = F.linear(layer.x, moved.weight(layer.W), moved.bias)
        return (y.flatten() * torch.linspace(-1, 2, y.numel(), dtype=y.dtype)).sum()

    close(
        torch.func.grad(output(layer))(layer.trained), torch.func.grad(from_weights)(layer.trained)
    )


@EACH_START
def test_one_step_of_adam_moves_the_layer_as_far_as_its_learning_rate(case):
    """DeLoRA is the exception: from B = 0 it jumps once the norm of B exceeds 1e-4."""
    layer = make_layer(case)
    large = 1e-2 if case.jumps else 1e-4

    def moved(lr):
        leaves = {k: v.clone().requires_grad_() for k, v in layer.trained.items()}
        optimizer = torch.optim.AdamW(leaves.values(), lr=lr, weight_decay=0.0)
        output(layer)(leaves).backward()
        optimizer.step()
        return (layer.apply(leaves) - layer.apply()).norm().item()

    far, near = moved(large), moved(large / 10)
    assert near > 0
    if case.jumps:
        assert far / near < 1.5
        assert near > 0.1 * layer.apply().norm()
    else:
        assert 9 < far / near < 11


@EACH_CASE
@given(data=st.data())
def test_directional_derivative_equals_gradient_inner_product(case, data):
    layer = data.draw(layers(case, scrambled=True))
    generator = torch.Generator().manual_seed(1)
    tangents = {name: random_like(leaf, generator) for name, leaf in layer.trained.items()}
    gradients = torch.func.grad(output(layer))(layer.trained)
    _, derivative = torch.func.jvp(output(layer), (layer.trained,), (tangents,))
    close(derivative, sum((gradients[name] * tangents[name]).sum() for name in tangents))


@EACH_LINEAR_CASE
@given(data=st.data(), share=st.floats(-2, 2))
def test_the_layer_is_affine_in_x(case, data, share):
    layer = data.draw(layers(case, scrambled=True))
    other = layer.x.flip(-1) + 1
    mixed = layer.apply(x=share * layer.x + (1 - share) * other)
    close(mixed, share * layer.apply() + (1 - share) * layer.apply(x=other))


class Sizes(TorchDispatchMode):
    """Records the number of elements of the largest new tensor; views are not counted."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        for tensor in filter(is_tensor, tree_leaves(output)):
            if tensor.untyped_storage().data_ptr() not in old:
                self.largest = max(self.largest, tensor.numel())
        return output


@EACH_CASE
def test_no_matrix_of_the_size_of_the_weight_is_built(case):
    """Only variants with ``builds_dense`` build one."""
    layer = make_layer(case, d_in=40, d_out=40, scrambled=True)
    with Sizes() as sizes:
        layer.apply()
    smallest = min(layer.W.shape) ** 2
    assert (sizes.largest >= smallest) == case.variant.builds_dense


@EACH_CASE
@given(data=st.data(), tokens=st.integers(0, 3))
def test_any_batch_shape_is_the_same_rows(case, data, tokens):
    layer = data.draw(layers(case, scrambled=True, batch=(tokens, 4)))
    rows = layer.apply(x=layer.x.flatten(0, 1))
    assert rows.shape == (tokens * 4, layer.W.shape[0])
    close(layer.apply(), rows.unflatten(0, (tokens, 4)))
    close(layer.apply(x=layer.x.mT.contiguous().mT), layer.apply())
    if tokens:
        close(layer.apply(x=layer.x[0, 0]), layer.apply()[0, 0])


@EACH_CASE
@given(seed=seeds)
def test_init_depends_on_nothing_but_seed_site_and_config(case, seed):
    d_in, d_out, r = case.fit(4, 5, 2)
    bias = True if case.bias is None else case.bias
    a, b = nn.Linear(d_in, d_out, bias), nn.Linear(*case.fit(5, 4, 2)[:2], bias)
    wide = Layers({"a": a, "b": b})
    everything = make_params(case, wide, r, seed=seed)
    torch.rand(3)
    again = make_params(case, wide, r, seed=seed)
    assert all(torch.equal(leaf, again[key]) for key, leaf in everything.items())
    alone = make_params(case, Layers({"b": b}), r, seed=seed)
    of_b = {key for key in everything if key.startswith("b.")}
    assert of_b == {key for key in alone if not key.startswith("*.")}
    assert all(torch.equal(alone[key], everything[key]) for key in of_b)


@EACH_CASE
def test_one_graph_serves_every_adapter_of_the_same_shapes(case):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(make_layer(case).variant.apply, fullgraph=True, backend=counter)
    for seed in range(3):
        layer = make_layer(case, seed=seed, scrambled=True)
        close(compiled(layer.W, layer.leaves, layer.x), layer.apply())
    assert counter.frame_count == 1


@EACH_CASE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_leaves_learn_on_a_half_precision_layer(case, dtype):
    layer = make_layer(case, scrambled=True, dtype=dtype, leaf_dtype=torch.float32)
    assert layer.apply().dtype == dtype
    gradients = torch.func.grad(lambda leaves: layer.apply(leaves).float().square().sum())(
        layer.trained
    )
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


@EACH_CASE
@given(d_in=dims, d_out=dims, seed=seeds, adapters=st.integers(1, 4))
def test_unstack_undoes_stack(case, d_in, d_out, seed, adapters):
    layer = make_layer(case, d_in, d_out, r=1, seed=seed, dtype=torch.float32)
    made = [make_params(case, layer.module, layer.r, seed=seed + i) for i in range(adapters)]
    again = lf.unstack(lf.stack(made))
    assert len(again) == adapters
    for one, other in zip(made, again, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def trained(params, loss, steps=4):
    """A copy of the leaves after some AdamW steps with one parameter group."""
    leaves = {key: leaf.detach().clone() for key, leaf in params.items()}
    moving = [leaf.requires_grad_() for leaf in lf.partition(leaves)[0].values()]
    optimizer = torch.optim.AdamW(moving, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(leaves).backward()
        optimizer.step()
    return {key: leaf.detach() for key, leaf in leaves.items()}


def two_ranks(case):
    return [case.fit(8, 8, r)[2] for r in (1, 3)]


RANKED = [case for case in CASES if len({case.config(r) for r in two_ranks(case)}) == 2]


@pytest.mark.parametrize("case", RANKED, ids=repr)
def test_a_stack_of_mixed_ranks_trains_like_its_members_or_is_refused(case):
    module = make_layer(case, d_in=8, d_out=8, r=3, seed=1).module
    adapters = [make_params(case, module, r, seed=r, dtype=torch.float64) for r in two_ranks(case)]
    if not make_layer(case).variant.pads:
        with pytest.raises(ValueError, match="cannot be padded exactly; stack adapters of"):
            lf.stack(adapters)
        return
    x = torch.randn(5, module.in_features, dtype=torch.float64)

    def loss(params):
        return lf.fcall(module, params, x, loss_fn=lambda y, _: (y - 1).square().sum())

    def losses(stacked):
        return torch.vmap(loss)(stacked).sum()

    stacked = trained(lf.stack(adapters), losses)
    for one, again in zip(adapters, lf.unstack(stacked), strict=True):
        close(again, trained(one, loss))
    for key, leaf in lf.stack(lf.unstack(stacked)).items():
        assert torch.equal(leaf, stacked[key]), f"{key}: the padding has moved"
