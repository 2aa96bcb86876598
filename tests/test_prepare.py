"""Leaves that are prepared once in a call: the same numbers, for all sites of one kind at once."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_func as lf
from lora_func.testing import Layers
from tests.support.cases import CASES

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


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.variant.prepare or c.variant.casts], ids=repr
)
def test_a_layer_without_a_part_in_the_loss_gets_no_gradient(case):
    d_in, d_out, r = case.fit(6, 6, 2)
    bias = case.bias is not False
    heads = Layers({name: nn.Linear(d_in, d_out, bias=bias) for name in "abc"})
    params = case.params(heads.requires_grad_(False), r)
    heads.forward = lambda x: [heads[name](x) for name in "ab"]
    for _ in range(2):  # gradients add up
        _, y = lf.fcall(heads, params, (torch.ones(2, d_in),), strict=False)
        y.square().sum().backward()
    trained = lf.partition(params)[0]
    assert {key.split(".")[0] for key, leaf in trained.items() if leaf.grad is not None} <= {
        "b",
        "*",
    }


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
