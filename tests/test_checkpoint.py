"""Activation checkpointing: gradients equal the plain run, under every transform."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from transformers.modeling_outputs import SequenceClassifierOutput as Output

import lora_func as lf
from tests.support.families import FAMILIES
from tests.support.models import batch_for, make, scramble
from tests.support.snapshots import assert_same, snapshot

EACH_MODEL = pytest.mark.parametrize("family", ["qwen3", "gpt2", "bert"])
OVER_ADAPTERS = (None, 0, None)


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, scale=1.0):
        return x + scale * self.dropout(self.down(torch.tanh(self.up(self.norm(x)))))


class Checkpointed(nn.Module):
    """Blocks that are checkpointed in one of several common styles."""

    def __init__(self, how, dropout=0.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(3))
        self.how = how

    def forward(self, x):
        for block in self.blocks:
            x = self.how(block, x)
        return x.square().mean()


WAYS = {
    "module": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "method": lambda block, x: checkpoint(block.forward, x, use_reentrant=False),
    "keyword": lambda block, x: checkpoint(block, x, scale=1.0, use_reentrant=False),
    "lambda": lambda block, x: checkpoint(lambda y: block(y), x, use_reentrant=False),
    "closure": lambda block, x: checkpoint(lambda: block(x), use_reentrant=False),
    "nested": lambda block, x: checkpoint(
        lambda y: checkpoint(block, y, use_reentrant=False), x, use_reentrant=False
    ),
    "sequential": lambda block, x: checkpoint_sequential([block, block], 2, x, use_reentrant=False),
}


def once(block, x):
    return block(x)


def twice(block, x):
    return block(block(x))


EACH_WAY = pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)


def own_model(how, requires_grad=False, dropout=0.0):
    torch.manual_seed(0)
    return Checkpointed(how, dropout).requires_grad_(requires_grad)


CONFIGS = [
    lf.LoRA(r=2, target_modules="up|down"),
    lf.Full(target_parameters=r"norm\."),
]


def adapter(model, seed=0):
    return scramble(lf.init(model, CONFIGS, seed=seed), seed)


def gradients(model, params, batch):
    trained = lf.partition(params)[0]
    loss = lf.fcall(model, params, batch)
    return dict(zip(trained, torch.autograd.grad(loss, [*trained.values()]), strict=True))


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class Box:
    def __init__(self, tensor):
        self.tensor = tensor


class Hidden(nn.Module):
    """Runs a module that is not registered as its child."""

    def __init__(self, module):
        super().__init__()
        self.parts = [module]

    def forward(self, x):
        return self.parts[0](x)


def again(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


# hidden inputs and unusual arguments or results of a checkpointed function
HIDDEN = {
    "a default": lambda run, block, x: (lambda c: run(lambda y, c=c: torch.tanh(block(y)) * c, x))(
        block(x)
    ),
    "a partial in a closure": lambda run, block, x: (lambda f: run(lambda y: f(y), x))(
        partial(lambda c, y: block(y) * c, block(x))
    ),
    "an object as argument": lambda run, block, x: run(
        lambda y, box: block(y) * box.tensor, x, Box(block(x))
    ),
    "an object as result": lambda run, block, x: run(lambda y: Box(block(y)), block(x)).tensor,
    "two modules of a partial": lambda run, block, x: run(
        partial(lambda a, b, y: b(torch.tanh(a(y))), block.up, block.down), block.norm(x)
    ),
    "a module that is not registered": lambda run, block, x: run(Hidden(block), block(x)),
    "no module at all": lambda run, block, x: run(torch.add, block(x), block(2 * x)),
    "integers": lambda run, block, x: run(lambda y: (block(y), y.argmax(-1), 3), block(x))[0],
    "complex numbers": lambda run, block, x: torch.view_as_real(
        run(lambda y: torch.view_as_complex(block(y).unflatten(-1, (-1, 2)).contiguous()), x)
    ).flatten(-2),
    "an argument itself": lambda run, block, x: run(lambda y: (y, block(y)), block(x))[0],
}


@pytest.mark.parametrize("way", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["frozen", "requires grad"])
def test_what_a_function_hides_is_differentiated_too(way, requires_grad):
    x = torch.randn(4, 8)
    model = own_model(partial(way, again), requires_grad)
    without = own_model(partial(way, lambda function, *args: function(*args)), requires_grad)
    same(gradients(model, adapter(model), x), gradients(without, adapter(model), x))
    assert_transforms_agree(model, without, adapter, x)


@EACH_WAY
@pytest.mark.parametrize("requires_grad", [False, True], ids=["frozen", "requires grad"])
def test_torchs_checkpoint(how, requires_grad):
    model, x = own_model(how, requires_grad), torch.randn(4, 8)
    params = adapter(model)
    without = own_model(twice if how is WAYS["sequential"] else once)
    before = snapshot(model)
    same(gradients(model, params, x), gradients(without, params, x))
    assert_same(before, model)


@EACH_WAY
def test_torchs_checkpoint_under_transforms(how):
    model, x = own_model(how), torch.randn(4, 8)
    without = own_model(twice if how is WAYS["sequential"] else once)
    assert_transforms_agree(model, without, adapter, x)


def assert_transforms_agree(model, without, adapter, batch):
    """Compare every transform with and without checkpointing."""
    adapters = [{k: v.detach() for k, v in adapter(model, seed).items()} for seed in range(2)]
    stacked = lf.stack(adapters)
    trained, constants = lf.partition(adapters[0])
    tangent = {k: torch.randn_like(v) for k, v in trained.items()}

    def results(model):
        def loss(leaves):
            return lf.fcall(model, {**leaves, **constants}, batch)

        gradient = torch.func.grad(loss)
        over = torch.vmap(lf.fcall, OVER_ADAPTERS)
        leaves = {k: v.clone().requires_grad_(k in trained) for k, v in stacked.items()}
        losses = over(model, leaves, batch)
        return {
            "grad": gradient(trained),
            "vmap": losses.detach(),
            "autograd of vmap": torch.autograd.grad(losses.sum(), [leaves[k] for k in trained]),
            "vmap of grad": torch.vmap(torch.func.grad(lf.fcall, argnums=1), OVER_ADAPTERS)(
                model, stacked, batch
            ),
            "jvp": torch.func.jvp(loss, (trained,), (tangent,)),
            "forward over reverse": torch.func.jvp(gradient, (trained,), (tangent,)),
            "reverse over reverse": torch.func.grad(
                lambda leaves: sum((g * tangent[k]).sum() for k, g in gradient(leaves).items())
            )(trained),
        }

    ours, theirs = results(model), results(without)
    for name, result in theirs.items():
        torch.testing.assert_close(
            ours[name], result, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def hugging_face(family, dropout=False):
    model = make(family).requires_grad_(False).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not dropout:
            module.p = 0.0
    return model


def on_all(model, seed=0):
    return scramble(lf.init(model, lf.LoRA(r=2), seed=seed), seed)


@EACH_MODEL
def test_hugging_face(family):
    model = hugging_face(family)
    without = copy.deepcopy(model)
    model.activation_checkpointing_enable()
    batch, params = batch_for(model), on_all(model)
    before = snapshot(model)
    same(gradients(model, params, batch), gradients(without, params, batch))
    assert_same(before, model)


@EACH_MODEL
@pytest.mark.slow
def test_hugging_face_under_transforms(family):
    model = hugging_face(family)
    without = copy.deepcopy(model)
    model.activation_checkpointing_enable()
    assert_transforms_agree(model, without, on_all, batch_for(model))


@pytest.mark.parametrize("family", ["qwen3 moe", "mixtral", "mamba2", "gemma3, tied"])
def test_parameters_that_are_replaced_everywhere(family):
    family = FAMILIES[family]
    model = family.make().train()
    batch, params = family.batch(), family.adapter(model)
    expected = gradients(model, params, batch)
    model.activation_checkpointing_enable()
    same(gradients(model, params, batch), expected)
    functional = torch.func.grad(lf.fcall, argnums=1)(model, params, batch)
    same({key: functional[key] for key in expected}, expected)


def test_as_many_rows_as_ranks():
    """With these shapes, the factors of an effective weight look like activations."""
    x = torch.randn(8, 8)
    cfg = lf.LoRA(r=8, target_modules=(), target_parameters=r"up\.weight|down\.weight")
    model, without = own_model(WAYS["module"]), own_model(once)
    params = scramble(lf.init(model, cfg))
    same(gradients(model, params, x), gradients(without, params, x))


def test_two_models_with_adapters_in_one_thread():
    x, models = torch.randn(4, 8), [own_model(WAYS["module"], True) for _ in range(2)]
    params = [adapter(model, seed) for seed, model in enumerate(models)]
    leaves = [leaf for one in params for leaf in lf.partition(one)[0].values()]

    def loss(models):
        with lf.adapted(models[0], params[0]), lf.adapted(models[1], params[1]):
            return models[0](x) + models[1](x)

    plain = [own_model(once, True) for _ in range(2)]
    same(torch.autograd.grad(loss(models), leaves), torch.autograd.grad(loss(plain), leaves))


def test_a_loss_inside_a_checkpoint():
    class Model(Checkpointed):
        def forward(self, x):
            loss = torch.nn.functional.mse_loss
            return Output(loss=self.how(lambda y: loss(self.blocks[0](y), y + 1), x))

    torch.manual_seed(0)
    model, x = Model(again).requires_grad_(False), torch.randn(4, 8)
    adapters = [adapter(model, seed) for seed in range(3)]
    adapters = [{k: v for k, v in one.items() if "blocks.0" in k} for one in adapters]
    leaves = [leaf for one in adapters for leaf in lf.partition(one)[0].values()]
    losses = lf.vcall(model, lf.stack(adapters), x)
    loop = torch.stack([lf.fcall(model, one, x) for one in adapters])
    same(losses, loop)
    same(torch.autograd.grad(losses.sum(), leaves), torch.autograd.grad(loop.sum(), leaves))


def test_the_old_name():
    model = hugging_face("qwen3")
    with pytest.warns(FutureWarning, match="activation_checkpointing_enable"):
        model.gradient_checkpointing_enable()
    batch, params = batch_for(model), on_all(model)
    ours = gradients(model, params, batch)
    model.activation_checkpointing_disable()
    same(ours, gradients(model, params, batch))


class Counted(Block):
    calls = 0

    def forward(self, x, scale=1.0):
        type(self).calls += 1
        return super().forward(x, scale)


@pytest.mark.parametrize("functional", [False, True], ids=["autograd", "torch.func"])
def test_the_block_is_computed_again(functional):
    model, x = own_model(WAYS["module"]), torch.randn(4, 8)
    model.blocks = nn.ModuleList(Counted() for _ in range(3)).requires_grad_(False)
    params = lf.init(model, lf.LoRA(r=2, target_modules="up"))
    Counted.calls = 0
    if functional:
        torch.func.grad(lf.fcall, argnums=1)(model, params, x)
    else:
        lf.fcall(model, params, x).backward()
    assert Counted.calls == 6


@EACH_MODEL
def test_dropout_is_reproduced(family):
    model = hugging_face(family, dropout=True)
    without, batch, params = copy.deepcopy(model), batch_for(model), on_all(model)
    model.activation_checkpointing_enable()
    stacked = lf.stack([params, on_all(model, seed=1)])
    over = torch.vmap(torch.func.grad(lf.fcall, argnums=1), OVER_ADAPTERS, randomness="different")
    for function, adapter in (
        (gradients, params),
        (torch.func.grad(lf.fcall, argnums=1), params),
        (over, stacked),
    ):
        results = []
        for one in (model, without):
            torch.manual_seed(3)
            results.append((function(one, adapter, batch), torch.rand(1)))
        same(*results)


def test_autocast_is_reproduced():
    batch, params = torch.randn(4, 8), adapter(own_model(once))
    for function in (gradients, torch.func.grad(lf.fcall, argnums=1)):
        results = []
        for how in (WAYS["module"], once):
            with torch.autocast("cpu", torch.bfloat16):
                results.append(function(own_model(how), params, batch))
        same(*results)


def test_backward_in_any_order_and_twice():
    model, without = own_model(WAYS["module"]), own_model(once)
    adapters, x = [adapter(model, seed) for seed in range(2)], torch.randn(4, 8)
    losses = [lf.fcall(model, one, x) for one in adapters]
    for one, loss in reversed([*zip(adapters, losses, strict=True)]):
        trained = lf.partition(one)[0]
        leaves = [*trained.values()]
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves)
        same(first, again)
        same(dict(zip(trained, first, strict=True)), gradients(without, one, x))


def test_backward_inside_the_block_and_inside_that_of_another():
    model, without = own_model(WAYS["module"]), own_model(once)
    params, other, x = adapter(model), adapter(model, 1), torch.randn(4, 8)
    leaves = [*lf.partition(params)[0].values()]
    expected = [*gradients(without, params, x).values()]
    with lf.adapted(model, params):
        same([*torch.autograd.grad(model(x), leaves)], expected)
    loss = lf.fcall(model, params, x)
    with lf.adapted(model, other), pytest.raises(lf.BusyModelError):
        torch.autograd.grad(loss, leaves, retain_graph=True)
    same([*torch.autograd.grad(loss, leaves)], expected)


def test_a_model_without_adapter_is_left_to_torch():
    one, other, x = own_model(WAYS["module"]), own_model(WAYS["module"], True), torch.randn(4, 8)
    with lf.adapted(one, adapter(one)):
        other(x).backward()
    expected = own_model(once, True)
    expected(x).backward()
    same(other.blocks[0].up.weight.grad, expected.blocks[0].up.weight.grad)


def test_what_is_refused():
    x = torch.randn(4, 8)
    model = own_model(lambda block, x: checkpoint(block, x, use_reentrant=True))
    params = adapter(model)
    with pytest.raises(RuntimeError, match=r"use_reentrant=True.*no gradient; pass use_reentrant"):
        lf.fcall(model, params, x)
    selective = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    model = own_model(
        lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=selective)
    )
    same(gradients(model, params, x), gradients(own_model(once), params, x))
    with pytest.raises(RuntimeError, match="leave context_fn out"):
        torch.func.grad(lf.fcall, argnums=1)(model, params, x)


def test_compiled():
    model = hugging_face("qwen3")
    without = copy.deepcopy(model)
    model.activation_checkpointing_enable()
    model.disable_input_require_grads()
    batch, params = batch_for(model), on_all(model)
    torch._dynamo.reset()
    trained = [*lf.partition(params)[0].values()]
    loss = torch.compile(lf.fcall, fullgraph=True, backend="aot_eager")(model, params, batch)
    same([*torch.autograd.grad(loss, trained)], [*gradients(without, params, batch).values()])
    gradient = torch.compile(
        torch.func.grad(lf.fcall, argnums=1), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="torch cannot compile activation checkpointing"
    ):
        gradient(model, params, batch)
    same(gradients(model, params, batch), gradients(without, params, batch))
