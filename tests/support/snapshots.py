"""Snapshots of a model before and after a call: attributes, their order, and every bit."""

import torch

PLACES = (
    *("_parameters", "_buffers", "_modules"),
    *("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks"),
)


def snapshot(model):
    """Record everything that a call could change: attributes, their order, and every bit."""
    modules = [
        (name, module, {k: id(v) for k, v in module.__dict__.items()})
        for name, module in model.named_modules()
    ]
    places = [
        [(k, id(v)) for k, v in getattr(module, place).items()]
        for module in model.modules()
        for place in PLACES
    ]
    tensors = [
        (t, t.clone(), t._version, t.requires_grad)
        for t in model.state_dict(keep_vars=True).values()
    ]
    return modules, [list(state) for *_, state in modules], places, tensors


def assert_same(before, model, versions=True):
    after = snapshot(model)
    assert after[0] == before[0]
    assert after[1] == before[1]
    assert after[2] == before[2]
    for (_, bits, version, requires_grad), (now, *_) in zip(before[3], after[3], strict=True):
        assert torch.equal(now, bits)
        assert now._version == version or not versions
        assert now.requires_grad == requires_grad
        assert now.grad is None
