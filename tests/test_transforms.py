"""Settings of torch and transformers during a call, and that they are restored."""

import warnings

import pytest
import torch
import transformers.masking_utils
from torch import nn
from torch.autograd import forward_ad

import lora_func as lf
from lora_func.runtime import patched, settings_now
from tests.support.models import batch_for, lora, make


def settings():
    cuda = torch.backends.cuda
    return {
        "math only": cuda.math_sdp_enabled() and not cuda.flash_sdp_enabled(),
        "unpeeked": transformers.masking_utils.is_tracing(torch.zeros(1)),
        "parts": not torch.backends.mha.get_fastpath_enabled(),
    }


OFF = {"math only": False, "unpeeked": False, "parts": False}


def during(transform, fast_path=False):
    found = {}

    def function(x):
        with patched(settings_now(fast_path)):
            found.update(settings())
        return (x**3).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        transform(function)
    assert settings() == OFF
    return found


X = torch.ones(2)


def dual(f):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(X, X))


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (lambda f: f(X), {}),
        (lambda f: torch.func.grad(f)(X), {}),
        (lambda f: torch.func.jvp(f, (X,), (X,)), {"math only": True}),
        (lambda f: dual(f), {"math only": True}),
        (lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(X), {"math only": True}),
        (lambda f: torch.vmap(f)(X[None]), {"math only": True, "unpeeked": True}),
        (lambda f: torch.vmap(torch.func.grad(f))(X[None]), {"math only": True, "unpeeked": True}),
    ],
    ids=["plain", "grad", "jvp", "dual", "hvp", "vmap", "vmap of grad"],
)
def test_each_transform_gets_what_it_needs(transform, expected):
    assert during(transform) == OFF | expected
    assert during(transform, fast_path=True) == OFF | expected | {"parts": True}


def test_overlapping_calls_share_a_setting():
    outer, inner = patched(settings_now(True)), patched(settings_now(True))
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert settings()["parts"]
    inner.__exit__(None, None, None)
    assert settings() == OFF


def test_settings_of_the_user_are_restored():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with patched(settings_now(True)):
            pass
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_failing_call_restores_them_too():
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 1, 4, batch_first=True)).eval()
    params = lf.init(model, lf.LoRA(r=1, target_modules="linear"))
    with pytest.raises(AssertionError, match="embedding dimension of 4"):
        lf.fcall(model, params, torch.ones(2, 3, 5))
    assert settings() == OFF


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        total = torch.zeros(len(x), 4)
        total += self.layer(x)
        return total


def test_an_error_of_vmap_names_the_module_and_a_way():
    model, x = nn.Sequential(InPlace()).requires_grad_(False), torch.ones(3, 4)
    adapters = [lora(model, seed=seed, r=2) for seed in range(2)]
    over_adapters = torch.vmap(lf.fcall, in_dims=(None, 0, None))
    with pytest.raises(RuntimeError) as raised:
        over_adapters(model, lf.stack(adapters), x)
    (note,) = raised.value.__notes__
    assert note.startswith("in 0 (InPlace), under torch.vmap; vcall(model, stacked, batch) gives")
    assert note.endswith("an out-of-place operation here")
    expected = torch.stack([lf.fcall(model, one, x) for one in adapters])
    torch.testing.assert_close(lf.vcall(model, adapters, x), expected)


def test_an_error_of_vmap_under_autocast_names_eager_attention():
    model = make("qwen3").requires_grad_(False)
    batch, stacked = batch_for(model), lf.stack([lora(model, r=2)] * 2)
    over_adapters = torch.vmap(lf.fcall, in_dims=(None, 0, None))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match="same dtype") as raised:
            over_adapters(model, stacked, batch)
        assert "Qwen3Attention" in raised.value.__notes__[-1]
        assert 'attn_implementation="eager"' in raised.value.__notes__[-1]
        expected = lf.vcall(model, stacked, batch)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(
            over_adapters(model, stacked, batch), expected, rtol=0.02, atol=0
        )
