"""One test for each private name of torch, transformers, accelerate and bitsandbytes."""

import inspect

import accelerate.hooks
import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, MambaConfig, MambaModel
from transformers.pytorch_utils import Conv1D

from lora_func import compat
from lora_func.targeting._targets import never_calls
from lora_func.weights import is_conv1d
from tests.support.families import FAMILIES
from tests.support.models import make

X = torch.ones(2, 3)


def test_active_transforms():
    found = []

    def note(x):
        found.append((compat.active_transforms(), compat.transformed(), compat.needs_math()))
        return x.sum()

    note(X)
    torch.func.grad(note)(X)
    torch.vmap(torch.func.grad(note))(X)
    torch.func.jvp(note, (X,), (X,))
    assert found == [
        ([], False, False),
        (["Grad"], True, False),
        (["Vmap", "Grad"], True, True),
        (["Jvp"], True, True),
    ]


def test_forward_mode_of_autograd():
    assert not compat.in_forward_mode()
    with torch.autograd.forward_ad.dual_level():
        assert compat.in_forward_mode()
        assert compat.transformed()


def test_tensors_of_a_transform():
    kept = []

    def keep(x):
        kept.append(x)
        assert compat.is_wrapped(x)
        assert compat.is_alive(x)
        assert not compat.is_wrapped(compat.unwrapped(x))
        return x.sum()

    torch.func.grad(keep)(X)
    assert compat.is_wrapped(kept[0])
    assert not compat.is_alive(kept[0])
    assert compat.is_alive(X)
    assert not compat.is_wrapped(X)


def test_identity_and_version():
    t = torch.zeros(2)
    before = compat.version_of(t)
    t.add_(1)
    assert compat.version_of(t) == before + 1
    assert compat.identity_of(t) == compat.identity_of(t) != compat.identity_of(t.clone())
    with torch.inference_mode():
        assert compat.version_of(torch.zeros(1)) == 0


def test_versions_are_kept():
    tensor = torch.ones(2)
    with torch.inference_mode():
        unversioned = torch.ones(2)
    with compat.versions_kept([tensor, unversioned]):
        tensor.set_(tensor)
    assert tensor._version == 0


def test_operations():
    assert compat.reshape_unsafe(torch.arange(6.0), (2, 3)).shape == (2, 3)
    gradient, x = torch.randn(4, 5), torch.randn(3, 5)
    rows, columns = torch.tensor([0, 3]), torch.tensor([2, 1])
    entries = compat.gradient_of_entries(gradient, x, rows, columns)
    torch.testing.assert_close(entries, (gradient @ x.T)[rows, columns])


def test_subclasses_as_plain_tensors():
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *_):
            raise AssertionError

    loud = X.as_subclass(Loud)
    with compat.without_torch_function():
        assert loud.shape == (2, 3)


def test_modes():
    mode = TorchFunctionMode()
    assert compat.current_mode() is None
    with mode:
        assert compat.current_mode() is mode
        assert compat.pop_mode() is mode
        assert compat.current_mode() is None
        compat.push_mode(mode)


def test_the_dicts_of_a_module():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    weight = nn.Parameter(torch.zeros(3, 3))
    compat.parameters_of(module[0])["weight"] = weight
    assert module[0].weight is weight
    assert [*compat.children_of(module)] == ["0", "1"]
    assert "running_mean" in compat.buffers_of(module[1])
    module.register_forward_hook(lambda *_: None)
    assert len(compat.forward_hooks_of(module)) == 1
    names = [compat.PARAMETERS, compat.CHILDREN]
    names += [compat.HOOKS, compat.PRE_HOOKS, compat.STATE_HOOKS]
    assert all(name in vars(module) for name in names)


def test_the_dicts_of_a_scripted_module():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3)))
    assert [*compat.children_of(scripted)] == ["0"]
    assert {*compat.parameters_of(scripted[0])} == {"weight", "bias"}
    assert not compat.buffers_of(scripted)


def test_modules():
    compiled = torch.compile(nn.Linear(3, 3), backend="eager")
    assert type(compat.uncompiled(compiled)) is nn.Linear
    assert all(name in vars(nn.GRU(2, 2)) for name in compat.CACHED_WEIGHTS)
    conv = nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")
    assert compat.is_convolution(conv)
    assert not compat.is_convolution(nn.ConvTranspose1d(2, 2, 3))
    assert compat.is_transposed_convolution(nn.ConvTranspose1d(2, 2, 3))
    image = torch.randn(1, 2, 5)
    assert torch.equal(compat.convolve(conv, image, conv.weight, conv.bias), conv(image))
    assert compat.mixes_rows_in_training(nn.BatchNorm2d(2))
    assert not compat.mixes_rows_in_training(nn.InstanceNorm2d(2))


def test_checkpoint_looks_up_what_it_calls(monkeypatch):
    place, name = compat.CHECKPOINT_PATCH
    monkeypatch.setitem(place, name, lambda function, *args, **kwargs: "intercepted")
    assert checkpoint(torch.sin, X, use_reentrant=False) == "intercepted"
    monkeypatch.undo()
    assert torch.equal(compat.torch_checkpoint(torch.sin, X, use_reentrant=False), X.sin())


def test_accelerate():
    layer = nn.Linear(3, 3)
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    assert compat.OLD_FORWARD in vars(layer)


def test_transformers():
    assert callable(compat.masking_module().is_tracing)
    assert hasattr(FAMILIES["qwen3 moe"].make().config, compat.EXPERTS_SETTING)
    model = make("bert")
    model.enable_input_require_grads()
    hooks = [h for m in model.modules() for h in compat.forward_hooks_of(m).values()]
    assert any(map(compat.makes_inputs_require_grad, hooks))
    assert is_conv1d(Conv1D(2, 2))
    assert not is_conv1d(nn.Linear(2, 2))
    assert compat.is_cache(DynamicCache())


def test_trees_with_paths_and_what_an_operation_writes_to():
    found, layout = compat.tree_flatten_with_path(({"a": X}, [1]))
    assert [(path[0].idx, compat.name_of_path(path[1:])) for path, _ in found] == [
        (0, "['a']"),
        (1, "[0]"),
    ]
    assert compat.tree_flatten(({"a": X}, [1]))[1] == layout
    written = []

    class Noted(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            written.append(compat.written_arguments(func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    x, y = torch.ones(2), torch.zeros(2)
    with Noted():
        _ = x + y
        x.add_(1)
        torch.add(x, x, out=y)
        torch._foreach_add_([x, y], 1)
    assert [len(compat.tree_leaves(one)) for one in written] == [0, 1, 1, 2]


def test_tensors_are_copied_together():
    targets = [torch.zeros(2), torch.zeros(3)]
    compat.copy_all(targets, [torch.ones(2), torch.ones(3)])
    compat.copy_all([], [])
    assert [t.sum().item() for t in targets] == [2, 3]


def test_what_mamba_never_calls():
    config = MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=4)
    mixer = MambaModel(config).layers[0].mixer
    assert never_calls(mixer, "dt_proj")
    assert not never_calls(mixer, "x_proj")


@pytest.mark.parametrize("name", compat.BITSANDBYTES_LAYERS[1])
def test_bitsandbytes(name):
    kind = getattr(bnb.nn, name)
    assert kind.__module__ == compat.BITSANDBYTES_LAYERS[0]
    states = {bnb.functional.QuantState.__name__, bnb.MatmulLtState.__name__}
    assert states == {*compat.BITSANDBYTES_STATES}
    if tuple(map(int, bnb.__version__.split(".")[:2])) < (0, 50):
        return  # older releases do not repack
    source = inspect.getsource(bnb.functional) + inspect.getsource(bnb.nn.modules)
    assert compat.REPACKED_FOR_CPU in source
