"""Settings of torch and transformers during a call, and that they are restored."""

import warnings

import pytest
import torch
import transformers.masking_utils
from torch import nn
from torch.autograd import forward_ad

import lora_func as lf
from lora_func.runtime import patched, settings_now


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
