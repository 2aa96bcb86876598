"""fcall and adapted: results, errors, and that the model is unchanged afterwards."""

import asyncio
import contextlib
import copy
import functools
import gc
import pickle
import random
import signal
import weakref
from collections import UserDict
from types import SimpleNamespace

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.utils.hooks import RemovableHandle

import lora_func as lf
from lora_func.compat import CHECKPOINT_PATCH
from lora_func.runtime import layout_of, patched
from lora_func.runtime._layout import CACHED_LAYOUTS, _layouts
from lora_func.runtime._running import active
from lora_func.runtime._settings import _math_attention
from tests.support.models import TiedTwice, merged, scramble
from tests.support.models import lora as adapter
from tests.support.snapshots import assert_same, snapshot


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


class Watched(nn.Module):
    """A model that runs a callback in the middle of its forward pass."""

    def __init__(self, callback):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.callback = callback

    def forward(self, x):
        x = self.norm(self.first(x))
        self.callback()
        return self.second(x)


BOTH = [lf.LoRA(r=2), lf.Full(target_parameters=r"norm\.")]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_model_is_what_it_was_whatever_happened(error, frozen):
    def callback():
        if error:
            raise error("in the middle")

    model = Watched(callback).requires_grad_(not frozen)
    params, x = lf.init(model, BOTH), torch.randn(3, 4)
    before = snapshot(model)
    expected = pytest.raises(error) if error else contextlib.nullcontext()
    with expected:
        lf.fcall(model, params, x).sum().backward()
    assert_same(before, model)
    with expected, lf.adapted(model, params):
        model(x)
    assert_same(before, model)


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs POSIX timers")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_moment_leaves_nothing_behind():
    class Interrupt(BaseException):
        pass

    def interrupt(*_):
        raise Interrupt

    model, x = Watched(lambda: None).requires_grad_(False), torch.randn(3, 4)
    params, before = lf.init(model, BOTH), snapshot(model)
    rng, interrupted, found = random.Random(0), 0, signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(4000):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 4e-4))
                for _ in range(3):
                    lf.fcall(model, params, x)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                interrupted += 1
            assert all("forward" not in module.__dict__ for module in model.modules())
            assert not active
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, found)
    assert interrupted > 1000
    assert_same(before, model)


def test_a_leaf_that_is_the_models_own_parameter_is_trained():
    model, x = mlp(), torch.randn(3, 4)
    params = {"0.full.weight": model[0].weight}
    lf.fcall(model, params, x).sum().backward()
    assert model[0].weight.grad.any()
    assert model[0].bias.grad is None


def test_models_that_share_what_is_not_adapted_run_side_by_side():
    trunk, x = nn.Linear(4, 4), torch.randn(3, 4)
    one, other = (nn.Sequential(trunk, nn.Linear(4, 4)) for _ in range(2))
    mine, theirs = (adapter(m, seed=i, r=2, target_modules="1") for i, m in enumerate((one, other)))
    expected = lf.fcall(other, theirs, x)
    with lf.adapted(one, mine):
        assert torch.equal(lf.fcall(other, theirs, x), expected)
        lf.skeleton(other)
        with pytest.raises(lf.BusyModelError):
            lf.fcall(one, {}, x)


def test_the_base_gets_no_gradient_even_where_it_requires_one():
    model, x = mlp(), torch.randn(3, 4)
    params = lf.init(model, lf.LoRA(r=2, target_modules="^2$"))
    lf.fcall(model, params, x).sum().backward()
    assert params["2.lora.B"].grad.any()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_constants_get_no_gradient_and_no_tangent():
    model, x = mlp(), torch.randn(3, 4)
    params = {k: v.detach() + 0.1 for k, v in lf.init(model, lf.LoRA(r=2)).items()}

    def call(p):
        return lf.fcall(model, p, x).sum()

    gradients = torch.func.grad(call)(params)
    assert gradients["0.lora._scale"] == 0
    assert gradients["0.lora.A"].any()
    tangents = {
        k: torch.ones_like(v) if "_scale" in k else torch.zeros_like(v) for k, v in params.items()
    }
    assert torch.func.jvp(call, (params,), (tangents,))[1] == 0


def test_kinds_of_batch():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x, y):
            return self.layer(x) - y

    model, x, y = Named(), torch.randn(3, 4), torch.randn(3, 2)
    params = lf.init(model, lf.LoRA(r=1))
    expected = model(x, y)
    for batch in ((x, y), [x, y], {"x": x, "y": y}, UserDict(y=y, x=x)):
        assert torch.equal(lf.fcall(model, params, batch), expected)
    linear = nn.Linear(4, 2)
    assert torch.equal(lf.fcall(linear, lf.init(linear, lf.LoRA(r=1)), x), linear(x))
    with pytest.raises(
        TypeError, match="batch: got int, expected a mapping, a tuple, a list or a tensor"
    ):
        lf.fcall(model, params, 3)


def test_kinds_of_result():
    class Output(nn.Module):
        def __init__(self, output):
            super().__init__()
            self.layer, self.output = nn.Linear(4, 2), output

        def forward(self, x):
            return self.output(self.layer(x))

    x = torch.randn(3, 4)

    def result(output, loss_fn=None):
        model = Output(output)
        return lf.fcall(model, lf.init(model, lf.LoRA(r=1)), x, loss_fn=loss_fn)

    def with_loss(y):
        return SimpleNamespace(loss=y.sum(), logits=y)

    def without_loss(y):
        return SimpleNamespace(loss=None, logits=y)

    assert result(lambda y: y).shape == (3, 2)
    assert result(with_loss).shape == ()
    assert result(without_loss).logits.shape == (3, 2)
    assert result(without_loss, lambda output, batch: (output.logits.shape, batch is x)) == (
        (3, 2),
        True,
    )
    # the caller's loss_fn takes precedence over the model's loss
    assert result(with_loss, lambda output, batch: output.logits).shape == (3, 2)


def test_a_leaf_without_a_part_in_the_call_is_an_error():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x):
            return self.used(x) @ self.unused.weight

    model, x = Skips(), torch.randn(3, 4)
    for cfg, count, name in (
        (lf.LoRA(r=1), 3, "unused.lora.A"),
        (lf.Full(target_parameters="norm"), 2, "norm.full.bias"),
    ):
        params = lf.init(model, cfg)
        with pytest.raises(lf.UnusedLeafError, match=f"^{count} leaves had no part.*'{name}'"):
            lf.fcall(model, params, x)
        assert torch.equal(lf.fcall(model, params, x, strict=False), model(x))
        with pytest.raises(lf.UnusedLeafError, match=f"^{count} leaves"), lf.adapted(model, params):
            model(x)
        with lf.adapted(model, params, strict=False):
            model(x)
    params = lf.init(model, lf.LoRA(r=1, exclude_modules="unused"))
    lf.fcall(model, params, x)
    with pytest.raises(lf.UnusedLeafError, match=r"^1 leaves had no part.*'used\.lora\.magnitude'"):
        lf.fcall(model, params | {"used.lora.magnitude": torch.ones(4)}, x)


def test_parameters_that_others_read_are_trained_too():
    """A hook, another module or the parent module may read the parameter directly."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.scaled = nn.Embedding(6, 4), nn.Linear(4, 4)
            self.scaled.gain = nn.Parameter(torch.ones(4))
            self.scaled.register_forward_pre_hook(lambda m, args: args[0] * m.gain)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.gru = nn.GRU(4, 4, batch_first=True)

        def forward(self, ids):
            x = self.scaled(self.embed(ids))
            x, _ = self.attention(x, x, x)
            return self.gru(x)[0] @ self.embed.weight.T

    model, ids = Reads(), torch.tensor([[1, 2, 3]])
    params = lf.init(model, lf.Full(target_parameters=".*"))
    assert torch.equal(lf.fcall(model, params, ids), model(ids))
    params = {key: (leaf + torch.randn_like(leaf)).detach() for key, leaf in params.items()}
    new = {key.replace(".full.", "."): leaf for key, leaf in params.items()}
    expected = torch.func.functional_call(model, new, ids)
    assert torch.equal(lf.fcall(model, params, ids), expected)
    with lf.adapted(model, params):
        assert torch.equal(model(ids), expected)
    gradients = torch.func.grad(lambda p: lf.fcall(model, p, ids).square().sum())(params)
    assert all(gradient.any() for key, gradient in gradients.items() if "bias" not in key)


def test_a_stack_needs_vmap():
    model, x = mlp(), torch.randn(2, 4)
    head = lf.init(model, lf.Full(target_parameters=r"2\.bias"))
    stacked = lf.stack([head, head])
    with pytest.raises(ValueError, match=r"2\.full\.bias: got shape \(2, 2\).*torch\.vmap"):
        lf.fcall(model, stacked, x)
    assert torch.vmap(lf.fcall, (None, 0, None))(model, stacked, x).shape == (2, 2, 2)


@pytest.mark.parametrize("train", [True, False])
def test_torchs_own_transformer_layers_take_no_shortcut(train):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(train)
    model.requires_grad_(False)
    params = adapter(model, r=2, target_modules=r"linear\d$")
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    batch = {"src": x, "src_key_padding_mask": mask}
    expected = merged(model, params).train()(**batch)
    torch.testing.assert_close(lf.fcall(model, params, batch), expected)
    assert torch.backends.mha.get_fastpath_enabled()
    # attention reads this layer's weight without calling the layer
    params = adapter(model, r=2, target_modules="out_proj")
    expected = merged(model, params).train()(**batch)
    torch.testing.assert_close(lf.fcall(model, params, batch), expected)


def test_hooks_of_the_user_fire_once():
    model, x = mlp(), torch.randn(3, 4)
    params = lf.init(model, [lf.LoRA(r=2, target_modules="0"), lf.Full(target_parameters="2")])
    calls = []
    for name, module in model.named_modules():
        handle = module.register_forward_hook(lambda *_, name=name: calls.append(name))
        assert isinstance(handle, RemovableHandle)
    model[0].register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    y = lf.fcall(model, params, x)
    assert calls == ["0", "1", "2", ""]
    assert torch.equal(y, model(x))


def test_a_model_holds_one_adapter_at_a_time():
    model, x = mlp(), torch.randn(3, 4)
    params, before = adapter(model, r=2), snapshot(model)
    free = lf.skeleton(model)
    with lf.adapted(model, params):
        for run in (lf.fcall, lambda *args: lf.adapted(*args[:2]).__enter__()):
            with pytest.raises(lf.BusyModelError, match=r"around this call.*skeleton\(model\)"):
                run(model, params, x)
        assert torch.equal(lf.fcall(free, params, x), model(x))
    assert_same(before, model)


def test_interleaved_blocks_are_refused_and_leave_nothing():
    model = mlp()
    params, before = adapter(model, r=2), snapshot(model)

    async def job(seconds):
        with lf.adapted(model, params):
            await asyncio.sleep(seconds)

    async def main():
        return await asyncio.gather(job(0.01), job(0.03), return_exceptions=True)

    first, second = asyncio.run(main())
    assert first is None
    assert isinstance(second, lf.BusyModelError)
    assert_same(before, model)


def test_layers_that_are_replaced_or_quantised_later_are_seen():
    model, x = mlp(), torch.randn(3, 4)
    params = adapter(model, r=2)
    lf.fcall(model, params, x)
    replaced = model[2]
    model[2] = nn.Linear(6, 2)
    assert replaced is not model[2]
    torch.testing.assert_close(lf.fcall(model, params, x), merged(model, params)(x))
    model[0], model[1], model[2] = nn.Linear(4, 4), nn.Linear(4, 4), nn.Identity()
    params = adapter(model, r=2)
    lf.fcall(model, params, x)
    model[0], model[1] = model[1], model[0]
    torch.testing.assert_close(lf.fcall(model, params, x), merged(model, params)(x))
    params = {key.replace("1.", "2.", 1): leaf for key, leaf in params.items()}
    with pytest.raises(TypeError, match=r"2: lora adapts torch\.nn\.Linear.*found Identity"):
        lf.fcall(model, params, x)


def test_a_weight_is_read_when_the_layer_is_called():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    params = adapter(model, r=2)
    lf.fcall(model, params, x)
    model[0].weight.data = torch.zeros(4, 4)
    torch.testing.assert_close(lf.fcall(model, params, x), merged(model, params)(x))


def test_a_shared_module_is_one_site():
    layer = nn.Linear(4, 4)
    model, x = nn.ModuleDict({"a": layer, "b": layer}), torch.randn(3, 4)
    model.forward = lambda x: model["b"](model["a"](x))
    params = adapter(model, r=2)
    assert {key.split(".")[0] for key in params} == {"a"}
    layer_with = merged(layer, {key.removeprefix("a"): leaf for key, leaf in params.items()})
    torch.testing.assert_close(lf.fcall(model, params, x), layer_with(layer_with(x)))
    twice = params | {key.replace("a.", "b.", 1): leaf for key, leaf in params.items()}
    with pytest.raises(ValueError, match="b: adapted twice, by lora at 'a' and by lora"):
        lf.fcall(model, twice, x)


def test_keys_that_fit_nothing():
    model, x = mlp(), torch.randn(3, 4)
    leaf = torch.zeros(2)
    for key, message in {
        "5.lora.A": "'5.lora.A': the model has no module and no parameter '5'",
        "0.nothing.A": "no variant 'nothing'; there are",
        "A": 'is no adapter key; expected "site.variant.leaf"',
        "0.full.weigth": "Linear '0' has no parameter 'weigth'",
    }.items():
        with pytest.raises(KeyError, match=message):
            lf.fcall(model, {key: leaf}, x)
    with pytest.raises(ValueError, match="0: adapted twice, by lora at '0' and by full"):
        lf.fcall(model, adapter(model, r=2) | {"0.full.weight": leaf}, x)


def test_an_error_inside_a_site_names_it():
    model, x = mlp(), torch.randn(3, 4)
    params = lf.init(model, lf.LoRA(r=2))
    with pytest.raises(RuntimeError, match="in the lora adapter of '2'"):
        lf.fcall(model, params | {"2.lora.A": torch.zeros(2, 5)}, x)
    del params["0.lora.B"]
    with pytest.raises(ValueError, match=r"0\.lora\.B: this leaf is missing; .*\*\*constants"):
        lf.fcall(model, params, x)


def test_a_forward_that_someone_replaced_is_not_bypassed():
    model, x = mlp(), torch.randn(3, 4)
    params = adapter(model, r=2)
    original = model[0].forward
    model[0].forward = lambda x: original(x) + 1
    with pytest.raises(TypeError, match="0: its forward was replaced on the instance"):
        lf.fcall(model, params, x)
    full = lf.init(model, lf.Full(target_parameters="0"))
    assert torch.equal(lf.fcall(model, full, x), model(x))


def test_hooks_of_accelerate_stay_in_place():
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubles(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return (args[0] * 2,), kwargs

    model, x = mlp(), torch.randn(3, 4)
    params = adapter(model, r=2)
    expected = lf.fcall(model, params, x * 2)
    hooks.add_hook_to_module(model[0], Doubles())
    before = snapshot(model)
    for params_ in (params, params):
        assert torch.equal(lf.fcall(model, params_, x).detach(), expected.detach())
    full = lf.init(model, lf.Full(target_parameters="0"))
    assert torch.equal(lf.fcall(model, full, x), model(x))
    assert before[1] == snapshot(model)[1]


def test_a_module_that_knows_its_parent():
    model, x = mlp(), torch.randn(3, 4)
    params = adapter(model, r=2)
    expected = lf.fcall(model, params, x)
    model[0].parent = model
    assert torch.equal(lf.fcall(model, params, x), expected)


def test_no_model_is_kept_alive():
    model, x = mlp(), torch.randn(3, 4)
    params = adapter(model, r=2)
    lf.fcall(model, params, x)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_functions_of_the_adapter_are_pure():
    model, x = mlp(), torch.randn(3, 4)
    params = adapter(model, r=2)
    before = copy.deepcopy(params)
    call = functools.partial(lf.fcall, model, batch=x)
    assert torch.equal(call(params), call(params))
    assert all(torch.equal(leaf, before[key]) for key, leaf in params.items())


def test_leaves_need_not_be_leaves():
    """A leaf may be computed, for example by a hypernetwork; gradients flow through it."""
    model, x = mlp(), torch.randn(3, 4)
    knob = torch.tensor(0.5, requires_grad=True)
    params = {key: leaf.detach() for key, leaf in adapter(model, r=2).items()}
    lf.fcall(model, params | {"0.lora.B": params["0.lora.B"] * knob}, x).sum().backward()
    assert knob.grad != 0


class Autoencoder(nn.Module):
    """Calls a layer and also reads its weight."""

    def __init__(self, layer, read):
        super().__init__()
        self.layer, self.read = layer, read

    def forward(self, x):
        return self.read(self.layer, self.layer(x))


READERS = {
    "linear": (nn.Linear(4, 4), lambda layer, h: h.relu() @ layer.weight, torch.ones(2, 4)),
    "its bias": (nn.Linear(4, 4), lambda layer, h: h * layer.bias, torch.ones(2, 4)),
    "an operator first": (
        nn.Linear(4, 4),
        lambda m, h: (2 * m.weight.t()).sum() + h,
        torch.ones(2, 4),
    ),
    "convolution": (
        nn.Conv1d(4, 4, 1),
        lambda layer, h: h + layer.weight.squeeze(-1).sum(),
        torch.ones(1, 4, 3),
    ),
    "embedding": (
        nn.Embedding(5, 4),
        lambda layer, h: h @ layer.weight.T,
        torch.tensor([[1, 2, 3]]),
    ),
}


@pytest.mark.parametrize(("layer", "read", "x"), READERS.values(), ids=READERS)
@pytest.mark.parametrize("config", [lf.LoRA, lf.IA3, lf.DoRA], ids=lambda c: c.__name__)
def test_who_reads_a_weight_past_its_module_gets_the_adapted_one(layer, read, x, config):
    model = Autoencoder(copy.deepcopy(layer), read).requires_grad_(False)
    sizes = {} if config is lf.IA3 else {"r": 2}
    params = scramble(lf.init(model, config(target_modules="layer", **sizes)))
    merged_model = copy.deepcopy(model)
    merged_model.load_state_dict(lf.merge(model, params))
    y = lf.fcall(model, params, (x,))
    torch.testing.assert_close(y, merged_model(x))
    with lf.adapted(model, params):
        torch.testing.assert_close(model(x), y)
    gradients = torch.func.grad(lambda p: lf.fcall(model, p, (x,)).sum())(
        {key: leaf.detach() for key, leaf in params.items()}
    )
    trained = lf.partition(params)[0]
    expected = torch.autograd.grad(y.sum(), [*trained.values()])
    for key, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(gradients[key], gradient)
    stacked = lf.stack([params, params])
    if read is not READERS["its bias"][1] or config is lf.IA3:  # the others leave the bias
        with pytest.raises(lf.FoldError, match="reads this parameter past its module"):
            lf.vcall(model, stacked, (x,))
    looped = lf.vcall(model, stacked, (x,), fallback="loop")
    torch.testing.assert_close(looped[1], y)


def test_reading_the_dtype_of_a_weight_computes_nothing():
    def read(layer, h):
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        assert layer.get_parameter("weight").is_cpu
        assert (weight.shape, weight.device, weight.itemsize) == ((4, 4), h.device, 4)
        assert torch.zeros_like(weight).sum() == 0
        assert weight.new_ones(2).sum() == 2
        assert torch.is_floating_point(weight)
        return h.to(weight.dtype).to(weight).type_as(weight)

    model = Autoencoder(nn.Linear(4, 4), read).requires_grad_(False)
    params, x = adapter(model, r=2), torch.randn(3, 4)
    lf.fcall(model, params, x)
    assert lf.vcall(model, lf.stack([params, params]), x).shape == (2, 3, 4)


def test_what_cannot_see_an_adapted_weight_gets_no_frozen_one():
    model = Autoencoder(nn.Linear(4, 4), lambda m, h: h + torch.vmap(torch.sum)(m.weight).sum())
    y = lf.fcall(model.requires_grad_(False), adapter(model, r=2), torch.ones(2, 4))
    assert y.isnan().all()


def test_code_that_swaps_a_parameter_restores_the_frozen_one():
    def swaps(layer, h):
        return torch.func.functional_call(layer, {"bias": torch.zeros(4)}, h)

    for frozen in (True, False):
        model = Autoencoder(nn.Linear(4, 4), swaps).requires_grad_(not frozen)
        params, x, before = adapter(model, r=2), torch.ones(2, 4), snapshot(model)
        y = lf.fcall(model, params, x)
        assert not torch.equal(y, model(x))
        with lf.adapted(model, params):
            torch.testing.assert_close(model(x), y)
            torch.func.functional_call(model, {"layer.weight": torch.zeros(4, 4)}, x)
            torch.testing.assert_close(model(x), y)
        assert_same(before, model)


def test_a_shallow_copy_made_inside_is_plain_afterwards():
    model, x = mlp(), torch.randn(3, 4)
    with lf.adapted(model, adapter(model, r=2)):
        model(x)
        again = copy.copy(model[0])
    assert torch.equal(again(x), model[0](x))
    assert again.weight is model[0].weight


def test_hooks_that_come_and_go_inside_a_block():
    model, x, calls = mlp(), torch.randn(3, 4), []
    before = model.register_forward_pre_hook(lambda *_: calls.append("before"))
    with lf.adapted(model, adapter(model, r=2)):
        before.remove()
        model.register_forward_pre_hook(lambda *_: calls.append("inside"))
        model(x)
    model(x)
    assert calls == ["inside", "inside"]


def test_an_offloaded_model():
    model, x = mlp().requires_grad_(False), torch.randn(3, 4)
    params = adapter(model, r=2)
    expected = lf.fcall(model, params, x)
    looped = lf.vcall(model, lf.stack([params, params]), x)
    accelerate.cpu_offload(model, execution_device="cpu")
    for _ in range(2):
        torch.testing.assert_close(lf.fcall(model, params, x), expected)
        torch.testing.assert_close(lf.vcall(model, lf.stack([params, params]), x), looped)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_offloaded_model_is_read_where_its_weights_are(requires_grad, tmp_path):
    model, x = mlp().requires_grad_(requires_grad), torch.randn(3, 4)
    cfg = [lf.DoRA(r=2, target_modules="0"), lf.Full(target_parameters="2.bias")]
    params = scramble(lf.init(model, cfg))
    expected, merged, fresh = (
        lf.fcall(model, params, x),
        lf.merge(model, params),
        lf.init(model, cfg),
    )
    as_lora = lf.to_lora(params, model, 3, tol=1).params
    lf.save(params, tmp_path / "a", model=model)
    accelerate.cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(lf.fcall(model, params, x), expected)
    grads = torch.func.grad(lambda p: lf.fcall(model, p, x).sum())(params)
    assert grads["0.dora.B"].any()
    again = lf.load(tmp_path / "a", model=model)
    lf.save(params, tmp_path / "b", model=model)
    for found, wanted in (
        (again, params),
        (lf.merge(model, params), merged),
        (lf.init(model, cfg), fresh),
        (lf.to_lora(params, model, 3, tol=1).params, as_lora),
    ):
        assert {*found} == {*wanted}
        assert all(torch.equal(found[key], leaf) for key, leaf in wanted.items())
    assert all(p.is_meta and p.requires_grad is requires_grad for p in model.parameters())


def offloaded(model, how):
    model = copy.deepcopy(model)
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif how == "dispatch":
        tied = {}
        for name, module in model.named_children():
            weights = {f"{name}.{key}": p.clone() for key, p in module.state_dict().items()}
            own = {key: weights[f"{name}.{key}"] for key in module.state_dict()}
            settings = {"execution_device": "cpu", "offload": True, "weights_map": own}
            hook = AlignDevicesHook(**settings, tied_params_map=tied)
            add_hook_to_module(module, hook)
    return model


@pytest.mark.parametrize("how", ["cpu_offload", "dispatch"])
@pytest.mark.parametrize("cfg", [lf.LoRA(r=1), lf.DoRA(r=1), lf.SHiRA(r=1), lf.HRA(r=2)], ids=str)
def test_gradients_of_an_offloaded_model(how, cfg):
    model, x = mlp(), torch.randn(3, 4)
    params = scramble(lf.init(model, [cfg, lf.Full(target_parameters=r"0\.bias")]))
    found = {}
    for model_ in (model, offloaded(model, how)):
        trained = lf.partition(params)[0]
        y = lf.fcall(model_, params, x)
        slopes = torch.autograd.grad(y.square().sum(), trained.values())
        found[model_] = (y, lf.vcall(model_, [params, params], x), *slopes)
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_an_offloaded_model_keeps_its_ties():
    model, ids = TiedTwice(), torch.arange(6)[None]
    params = scramble(lf.init(model, lf.Full(target_parameters="embed.weight")))
    other = offloaded(model, "cpu_offload")
    torch.testing.assert_close(lf.fcall(other, params, ids), lf.fcall(model, params, ids))
    with pytest.raises(ValueError, match=r"embed\.weight: tied to head\.weight"):
        lf.merge(other, lf.init(other, lf.LoRA(r=2, target_modules="embed")))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # hidden by torch, unless an error
def test_data_parallel_wrappers_are_looked_through():
    model, x = mlp(), torch.randn(3, 4)
    params = adapter(model, r=2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert [*lf.init(wrapped, lf.LoRA(r=2))] == [*lf.init(model, lf.LoRA(r=2))]
        for _ in range(2):
            y = lf.fcall(wrapped, params, x)
            y.sum().backward()
            torch.testing.assert_close(y, lf.fcall(model, params, x))
    finally:
        dist.destroy_process_group()
    compiled = torch.compile(nn.DataParallel(model), backend="eager")
    assert [*lf.find_targets(compiled, lf.LoRA())] == [*lf.find_targets(model, lf.LoRA())]
    torch.testing.assert_close(lf.fcall(compiled, params, x), lf.fcall(model, params, x))


def test_a_layer_that_is_only_read_has_no_part():
    model = Autoencoder(nn.Linear(4, 4), lambda layer, h: h)
    model.forward = lambda x: x @ model.layer.weight
    params = adapter(model, r=2)
    with pytest.raises(lf.UnusedLeafError, match="only reads its weight past it"):
        lf.fcall(model, params, torch.ones(2, 4))


def test_a_block_without_a_call_is_no_error():
    model = mlp()
    with lf.adapted(model, adapter(model, r=2)):
        pass


@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("transform", [None, torch.func.grad])
def test_a_recurrent_layer_keeps_nothing(layer, transform):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = layer(4, 4, batch_first=True), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.layer(x)[0])

    model, x = Recurrent(), torch.randn(2, 3, 4)
    y, before = model(x), [id(w) for w in model.layer._flat_weights]
    cfg = [lf.Full(target_parameters="layer"), lf.LoRA(r=2, target_modules="last")]
    params = {key: leaf.detach() for key, leaf in scramble(lf.init(model, cfg)).items()}
    call = transform or (lambda function: function)
    call(lambda p: lf.fcall(model, p, x).sum())(params)
    assert [id(w) for w in model.layer._flat_weights] == before
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_a_running_model_is_not_copied(duplicate):
    model = mlp()
    for params in (adapter(model, r=2), lf.init(model, lf.Full(target_parameters="0.bias"))):
        with lf.adapted(model, params), pytest.raises(lf.BusyModelError, match="copied or pickled"):
            duplicate(model)
    duplicate(model)


def test_a_copy_made_inside_a_call_is_plain():
    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            self.again = [copy.deepcopy(self.norm)]
            return self.norm(x)

    model = Copies()
    params = scramble(lf.init(model, lf.Full(target_parameters="norm")))
    lf.fcall(model, params, torch.ones(2, 4))
    (again,) = model.again
    assert torch.equal(again.weight, model.norm.weight)


class Remembers(nn.Module):
    """Stores its output as a buffer and as an attribute."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("last", torch.zeros(2, 4))

    def forward(self, x):
        y = self.layer(x)
        self.last, self.seen = y.detach(), y
        return y


def vmapped(function):
    return lambda p: torch.vmap(function)({key: torch.stack([p[key], p[key]]) for key in p})


def pushed(function):
    return lambda p: torch.func.jvp(function, (p,), (p,))


@pytest.mark.parametrize("transform", [torch.func.grad, vmapped, pushed])
def test_a_transform_leaves_no_dead_tensor(transform):
    model = Remembers().requires_grad_(False)
    params = {key: leaf.detach() for key, leaf in lf.init(model, lf.LoRA(r=2)).items()}
    before = model.last
    transform(lambda p: lf.fcall(model, p, torch.ones(2, 4)).sum())(params)
    assert model.last is before
    assert not hasattr(model, "seen")
    copy.deepcopy(model)


def test_submodules_that_are_compiled_or_scripted():
    compiled = torch.compile(nn.Linear(4, 4), backend="eager")
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    for other in (compiled, scripted, nn.ModuleList(), nn.ParameterDict()):
        model = nn.Sequential(nn.Linear(4, 4), nn.Identity())
        model.other = other
        model.forward = lambda x, model=model: model[0](x)
        lf.fcall(model, lf.init(model, lf.LoRA(r=2, target_modules="^0$")), torch.ones(2, 4))


def test_layouts_are_bounded_and_know_no_order():
    model, x = nn.Sequential(*(nn.Linear(4, 4) for _ in range(7))), torch.ones(1, 4)
    params = adapter(model, r=1)
    layout = layout_of(model, params)
    assert layout_of(model, dict(reversed(params.items()))) is layout
    for i in range(1, 100):
        chosen = {k: v for k, v in params.items() if i >> int(k[0]) & 1}
        lf.fcall(model, chosen, x)
    assert len(_layouts[model]) <= CACHED_LAYOUTS


def test_a_variant_that_is_registered_again_is_the_one_that_runs():
    class Scaled(lf.LinearConfig):
        pass

    def scaled(by):
        return lf.Variant(
            name="scaled",
            config=Scaled,
            init=lambda W, cfg, generator, stats: {"g": torch.ones(())},
            apply=lambda W, params, x: lf.linear(x, W) * by * params["g"],
            leaves={"g": ""},
        )

    model, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4)
    lf.register(scaled(1))
    params = lf.init(model, Scaled())
    assert torch.equal(lf.fcall(model, params, x), model(x))
    lf.register(scaled(2), overwrite=True)
    assert torch.equal(lf.fcall(model, params, x), 2 * model(x))


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs POSIX timers")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_settings_of_torch_survive_interrupts():
    class Interrupt(BaseException):
        pass

    def interrupt(*_):
        raise Interrupt

    def settings():
        place, name = CHECKPOINT_PATCH
        cuda = torch.backends.cuda
        kernels = cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()
        return torch.backends.mha.get_fastpath_enabled(), kernels, place.get(name)

    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.Sequential(layer).eval().requires_grad_(False)
    params = {key: leaf.detach() for key, leaf in lf.init(model, lf.LoRA(r=2)).items()}
    x, rng, before = torch.randn(2, 3, 4), random.Random(0), settings()

    def run():
        lf.fcall(model, params, x)
        with patched([(_math_attention, object(), True)]):  # as vmap and jvp do
            pass

    run()
    found = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(500):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 4e-3))
                run()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, found)
    assert settings() == before


WANT_ONE = {
    "fcall": lambda model, several: lf.fcall(model, several, torch.ones(1, 4)),
    "adapted": lambda model, several: lf.adapted(model, several).__enter__(),
    "merge": lambda model, several: lf.merge(model, several),
    "to_lora": lambda model, several: lf.to_lora(several, model, 2),
    "attach": lambda model, several: lf.attach(model, several),
    "save": lambda model, several: lf.save(several, "several"),
    "summary": lambda model, several: lf.summary(several),
    "partition": lambda model, several: lf.partition(several),
    "to_peft": lambda model, several: lf.peft.to_peft(several, "several", model=model),
}


@pytest.mark.parametrize("use", WANT_ONE.values(), ids=WANT_ONE)
def test_a_list_where_one_adapter_is_wanted_is_refused(use):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    several = [lf.init(model, lf.LoRA(r=2), seed=seed) for seed in range(2)]
    with pytest.raises(TypeError, match="got a list; expected one adapter, a dict of tensors"):
        use(model, several)
