"""Every architecture: loss, autograd and torch.func transforms, each compared with the loop."""

import pytest
import torch

import lora_func as lf
from tests.support.families import EACH_FAMILY
from tests.support.snapshots import assert_same, snapshot

OVER_ADAPTERS = (None, 0, None)


def same(ours, theirs, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def detached(params):
    return {key: leaf.detach() for key, leaf in params.items()}


@EACH_FAMILY
def test_gradients(family):
    model, batch = family.make(), family.batch()
    params, before = family.adapter(model), snapshot(model)
    trained, constants = lf.partition(params)

    def loss(leaves):
        return lf.fcall(model, {**leaves, **constants}, batch, loss_fn=family.loss_fn)

    assert not torch.equal(loss(params), loss(lf.init(model, family.configs())))
    by_autograd = torch.autograd.grad(loss(trained), [*trained.values()])
    gradients = dict(zip(trained, by_autograd, strict=True))
    assert all(gradient.any() for gradient in gradients.values())
    point = detached(trained)
    same(torch.func.grad(loss)(point), gradients)
    tangent = {key: torch.randn_like(leaf) for key, leaf in point.items()}
    slope = sum((gradients[key] * tangent[key]).sum() for key in point)
    same(torch.func.jvp(loss, (point,), (tangent,))[1], slope)
    _, curvature = torch.func.jvp(torch.func.grad(loss), (point,), (tangent,))

    def slope_at(leaves):
        return sum((g * tangent[k]).sum() for k, g in torch.func.grad(loss)(leaves).items())

    same(torch.func.grad(slope_at)(point), curvature, rtol=1e-3, atol=1e-4)
    assert_same(before, model)


@EACH_FAMILY
@pytest.mark.parametrize("batched", [False, True], ids=["shared", "own batches"])
def test_vmap_equals_the_loop(family, batched):
    model, adapters, batches, together = setting(family, batched)
    axes = (None, 0, 0 if batched else None)

    def call(model, params, batch):
        return lf.fcall(model, params, batch, loss_fn=family.loss_fn)

    losses = torch.vmap(call, axes)(model, lf.stack(adapters), together)
    loop = [call(model, *pair) for pair in zip(adapters, batches, strict=True)]
    same(losses, torch.stack(loop))
    of_all = torch.vmap(torch.func.grad(call, argnums=1), axes)(
        model, lf.stack([detached(one) for one in adapters]), together
    )
    for i, (one, loss) in enumerate(zip(adapters, loop, strict=True)):
        trained = lf.partition(one)[0]
        for key, gradient in zip(
            trained, torch.autograd.grad(loss, [*trained.values()]), strict=True
        ):
            same(of_all[key][i], gradient)


@EACH_FAMILY
@pytest.mark.parametrize("batched", [False, True], ids=["shared", "own batches"])
def test_vcall_equals_the_loop(family, batched):
    model, adapters, batches, together = setting(family, batched)
    before = snapshot(model)
    settings = {"loss_fn": family.loss_fn, "batched": batched}
    if family.unfoldable is not None:
        with pytest.raises(lf.FoldError, match=family.unfoldable):
            lf.vcall(model, lf.stack(adapters), together, **settings)
        settings["fallback"] = "loop"
    losses = lf.vcall(model, lf.stack(adapters), together, **settings)
    loop = torch.stack(
        [
            lf.fcall(model, *pair, loss_fn=family.loss_fn)
            for pair in zip(adapters, batches, strict=True)
        ]
    )
    same(losses, loop)
    trained = [leaf for one in adapters for leaf in lf.partition(one)[0].values()]
    same(torch.autograd.grad(losses.sum(), trained), torch.autograd.grad(loop.sum(), trained))
    assert_same(before, model)


def setting(family, batched):
    model = family.make()
    adapters = [family.adapter(model, seed) for seed in range(3)]
    batches = [family.batch(seed=seed if batched else 0) for seed in range(3)]
    stacked = {key: torch.stack([batch[key] for batch in batches]) for key in batches[0]}
    return model, adapters, batches, stacked if batched else batches[0]
