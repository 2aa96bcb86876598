"""Leaves that are prepared once in a call: the same numbers, for all sites of one kind at once."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_func as lf
from lora_func.variant import prepare_sites
from tests.support.cases import CASES, Layers, make_layer, make_params, scrambled_stack
from tests.support.strategies import dims, seeds

PREPARED = [case for case in CASES if case.variant.prepare or case.variant.casts]
EACH_CASE = pytest.mark.parametrize("case", PREPARED, ids=repr)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def site(case, **settings):
    return make_layer(case, scrambled=True, **settings)


def shared_leaves(layer):
    """The leaves that all sites of an adapter have in common."""
    return {"_A", "_B"} if layer.variant.shared else set()


def output_and_gradients(layer, leaves, ready):
    trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
    y = layer.variant.apply(layer.W, ready, layer.x)
    return y, *torch.autograd.grad(y.double().sin().sum(), trained, retain_graph=True)


@EACH_CASE
@given(d_in=dims, d_out=dims, seed=seeds, sites=st.integers(1, 3), r=st.integers(1, 2))
def test_apply_gives_the_same_with_prepared_leaves(case, d_in, d_out, seed, sites, r):
    r = min(r, d_in, d_out)
    layers = [site(case, d_in=d_in, d_out=d_out, r=r, seed=seed + i) for i in range(sites)]
    shared, first = shared_leaves(layers[0]), layers[0]
    leaves = [
        {
            name: (first if name in shared else layer)
            .leaves[name]
            .float()
            .requires_grad_(name in layer.trained)
            for name in layer.leaves
        }
        for layer in layers
    ]
    ready = prepare_sites(first.variant, leaves, shared, first.W.shape, torch.float64)
    for layer, own, prepared in zip(layers, leaves, ready, strict=True):
        alone = output_and_gradients(layer, own, own)
        for ours, expected in zip(output_and_gradients(layer, own, prepared), alone, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in PREPARED if c.variant.stacks], ids=repr)
@given(seed=seeds, adapters=st.integers(1, 3), sites=st.integers(1, 2), rows=st.integers(0, 2))
def test_apply_gives_the_same_with_a_prepared_stack(case, seed, adapters, sites, rows):
    layers = [site(case, seed=seed + i) for i in range(sites)]
    shared, first = shared_leaves(layers[0]), layers[0]
    stacks = [scrambled_stack(layer, adapters, seed + i)[1] for i, layer in enumerate(layers)]
    stacks = [{**stack, **{leaf: stacks[0][leaf] for leaf in shared}} for stack in stacks]
    ready = prepare_sites(first.variant, stacks, shared, first.W.shape, torch.float64)
    x = torch.randn(adapters, rows, first.x.shape[-1], dtype=torch.float64)
    for layer, own, prepared in zip(layers, stacks, ready, strict=True):
        ours, expected = (layer.variant.apply(layer.W, leaves, x) for leaves in (prepared, own))
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@EACH_CASE
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_prepared_leaves_leave_the_start_as_it_is(case, dtype):
    if case.start == "elsewhere":
        pytest.skip("does not start as the base")
    layer = make_layer(case, dtype=dtype, leaf_dtype=torch.float32, batch=(2, 3))
    leaves = [layer.leaves] * 2
    for ready in prepare_sites(layer.variant, leaves, shared_leaves(layer), layer.W.shape, dtype):
        y, frozen = layer.variant.apply(layer.W, ready, layer.x), layer.module(layer.x)
        assert y.dtype == dtype
        tolerance = 0 if case.start == "exact" else 32 * torch.finfo(dtype).eps
        torch.testing.assert_close(y, frozen, rtol=tolerance, atol=tolerance)


calls = Counter()


def counted_prepare(params, shape, dtype):
    calls[tuple(params["g"].shape), shape] += 1
    return {"h": params["g"].to(dtype)}


def counted_apply(W, params, x):
    calls["prepared" if "h" in params else "alone"] += 1
    g = params.get("h", params["g"]).to(x.dtype)
    return lf.linear(x, W) * (g if g.ndim == 1 else g[:, None])


class Counted(lf.IA3):
    """Gains, with a count of what is called."""


COUNTED = lf.Variant(
    "counted",
    Counted,
    init=lambda W, cfg, generator, stats: {"g": torch.ones(W.shape[0])},
    apply=counted_apply,
    leaves={"g": "d_out"},
    prepare=counted_prepare,
    weight=lambda W, params: lf.dense(W) * params["g"][:, None],
    stacks=True,
)


@pytest.fixture
def model():
    lf.register(COUNTED, overwrite=True)
    calls.clear()
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 4)]
    return nn.Sequential(*layers).requires_grad_(False)


KINDS = {((2, 4), (4, 4)): 1, ((1, 6), (6, 4)): 1, ((1, 4), (4, 6)): 1}
X = torch.ones(2, 4)


def total(y, _):
    return y.square().sum()


def test_a_call_prepares_once_for_all_sites_of_one_kind(model):
    params = lf.init(model, Counted())
    y = lf.fcall(model, params, X)
    assert calls == {**KINDS, "prepared": 4}
    torch.testing.assert_close(y, model(X))


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        torch.func.jacrev,
        torch.func.jacfwd,
        lambda f: torch.func.grad(torch.func.grad(f)),
    ],
)
def test_a_transform_prepares_once(model, transform):
    params = lf.init(model, Counted())
    gains, rest = params["0.counted.g"].sum(), {k: v for k, v in params.items() if k[0] != "0"}

    def loss(size):
        own = {"0.counted.g": size * torch.ones(4) / 4, **rest}
        return lf.fcall(model, own, X, loss_fn=total)

    transform(loss)(gains)
    assert calls == {**KINDS, "prepared": 4}


def test_a_sweep_prepares_once_with_the_axis_of_the_adapters(model):
    stack = lf.stack([lf.init(model, Counted())] * 3)
    lf.vcall(model, stack, X, check="never")
    expected = {((sites, 3, d), shape): 1 for (sites, d), shape in KINDS}
    assert calls == {**expected, "prepared": 4}
    calls.clear()
    torch.vmap(lf.fcall, in_dims=(None, 0, None))(model, stack, X)
    assert calls == {**KINDS, "prepared": 4}


def test_a_recomputed_part_uses_what_was_prepared_for_the_call(model):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    outer = Checkpointed()
    params = {k: v.requires_grad_() for k, v in lf.init(outer, Counted()).items()}
    lf.fcall(outer, params, X, loss_fn=total).backward()
    assert calls == {**KINDS, "prepared": 8}


def test_a_block_of_adapted_prepares_nothing_so_that_leaves_may_change(model):
    params = lf.init(model, Counted())
    with lf.adapted(model, params), torch.no_grad():
        before = model(X)
        params["3.counted.g"].mul_(2)
        after = model(X)
    torch.testing.assert_close(after, 2 * before)
    assert calls == {"alone": 8}


@pytest.mark.parametrize("case", PREPARED, ids=repr)
def test_a_layer_without_a_part_in_the_loss_gets_no_gradient(case):
    d_in, d_out, r = case.fit(6, 6, 2)
    bias = case.bias is not False
    heads = Layers({name: nn.Linear(d_in, d_out, bias=bias) for name in "abc"})
    params = make_params(case, heads.requires_grad_(False), r)
    heads.forward = lambda x: [heads[name](x) for name in "ab"]
    for _ in range(2):  # gradients add up
        _, y = lf.fcall(heads, params, (torch.ones(2, d_in),), strict=False)
        y.square().sum().backward()
    trained = lf.partition(params)[0]
    assert {key.split(".")[0] for key, leaf in trained.items() if leaf.grad is not None} <= {"b"}


def test_dropout_goes_by_the_mode_in_which_a_module_runs():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            self.inner.train(not self.training)
            return self.inner(x)

    half, x = Half().requires_grad_(False), torch.ones(4, 8)
    for cfg in (lf.LoRA(r=2, dropout=0.5), lf.PiSSA(r=2, dropout=0.5)):
        params = {k: v if "._" in k else v + 1 for k, v in lf.init(half, cfg).items()}
        ran = [lf.fcall(half.train(), params, x) for _ in range(2)]
        assert torch.equal(*ran)
        ran = [lf.fcall(half.eval(), params, x) for _ in range(2)]
        assert not torch.equal(*ran)


def test_activations_of_another_dtype_take_the_leaves_themselves(model):
    params = lf.init(model, Counted())
    with torch.autocast("cpu", torch.bfloat16):
        lf.fcall(model, params, X.bfloat16())
    assert calls["alone"] == 4


def test_what_prepare_may_not_return(model):
    bad = COUNTED._replace(prepare=lambda params, shape, dtype: {"h": params["g"].sum()})
    lf.register(bad, overwrite=True)
    with pytest.raises(ValueError, match=r"'h' has shape \(\); it needs an axis of") as raised:
        lf.fcall(model, lf.init(model, Counted()), X)
    assert "in prepare of counted, for 2 sites like '0'" in raised.value.__notes__
    bad = COUNTED._replace(prepare=lambda params, shape, dtype: {"h": 1.0})
    lf.register(bad, overwrite=True)
    with pytest.raises(ValueError, match=r"'h' has shape 1\.0; it needs an axis of"):
        lf.fcall(model, lf.init(model, Counted()), X)
    with pytest.raises(ValueError, match=r"casts names \['f'\], which are no leaves"):
        lf.register(COUNTED._replace(casts=("f",)), overwrite=True)
    torch.testing.assert_close(model(X), nn.Sequential.forward(model, X))


def test_activations_of_a_quantised_model_have_the_dtype_of_what_is_not_quantised():
    bnb = pytest.importorskip("bitsandbytes")
    layers = [nn.Embedding(5, 64), bnb.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16)]
    model = nn.Sequential(*layers).bfloat16().requires_grad_(False)
    model.to("cpu")  # quantises
    lf.register(COUNTED, overwrite=True)
    calls.clear()
    lf.fcall(model, lf.init(model, Counted(target_modules="1")), torch.arange(5))
    assert calls["prepared"] == 1
