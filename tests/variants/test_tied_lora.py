"""Tied LoRA compared with its formula; its A is one leaf of all sites, in every function."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.testing import Case, layers
from tests.support.models import scramble

CASE = Case("tied-lora", lambda r: lf.TiedLoRA(r=r, alpha=3.0))
KEY = "*.tied_lora.A"


def model_of_two():
    return nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 3)).double()


def adapter_of(model, seed=0):
    cfg = lf.TiedLoRA(r=2)
    return scramble(lf.init(model, cfg, seed=seed, dtype=torch.float64), seed=seed)


@given(data=st.data())
def test_formula(data):
    layer = data.draw(layers(CASE, scrambled=True))
    p, W = layer.leaves, layer.module.weight
    r = p["B"].shape[1]
    torch.testing.assert_close(layer.weight(), W + 3 / r * p["B"] @ p["A"][:, : W.shape[1]])


def test_its_gradient_is_the_sum_over_sites():
    model, x = model_of_two(), torch.randn(3, 4).double()
    params = adapter_of(model)
    lf.fcall(model, params, x).square().sum().backward()
    apart = {
        f"{site}.lora.{leaf}": params[KEY if leaf == "A" else f"{site}.tied_lora.{leaf}"].detach()
        for site in "01"
        for leaf in ("A", "B", "_scale")
    }
    apart["0.lora.A"] = apart["0.lora.A"][:, :4]
    apart = {key: leaf.clone().requires_grad_(key[-1] == "A") for key, leaf in apart.items()}
    lf.fcall(model, apart, x).square().sum().backward()
    expected = apart["1.lora.A"].grad.clone()
    expected[:, :4] += apart["0.lora.A"].grad
    torch.testing.assert_close(params[KEY].grad, expected)


def test_each_adapter_of_a_stack_has_its_own():
    model, x = model_of_two(), torch.randn(3, 4).double()
    each = [adapter_of(model, seed) for seed in range(2)]
    stack = {key: leaf.detach() for key, leaf in lf.stack(each).items()}
    stack[KEY].requires_grad_()
    assert stack[KEY].shape == (2, 2, 7)
    lf.vcall(model, stack, x).square().sum().backward()
    for i, params in enumerate(each):
        lf.fcall(model, params, x).square().sum().backward()
        torch.testing.assert_close(stack[KEY].grad[i], params[KEY].grad)


def test_smaller_ranks_are_padded():
    model, x = model_of_two(), torch.randn(3, 4).double()
    each = [scramble(lf.init(model, lf.TiedLoRA(r=r), dtype=torch.float64), seed=r) for r in (1, 3)]
    outputs = lf.vcall(model, lf.stack(each), x)
    for params, output in zip(each, outputs, strict=True):
        torch.testing.assert_close(output, lf.fcall(model, params, x))


def test_attached_it_is_one_parameter(tmp_path):
    model, x = model_of_two(), torch.randn(3, 4).double()
    params = adapter_of(model)
    expected = lf.fcall(model, params, x)
    expected.square().sum().backward()
    with lf.attach(model, params) as handle:
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sorted(p.shape for p in trained) == [(2, 7), (3, 2), (7, 2)]
        output = model(x)
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        (shared,) = (p for p in trained if p.shape == (2, 7))
        torch.testing.assert_close(shared.grad, params[KEY].grad)
        torch.optim.SGD(trained, 0.1).step()
        moved = handle.params()
        torch.testing.assert_close(moved[KEY], params[KEY].detach() - 0.1 * params[KEY].grad)
        output = model(x)
        storages = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
        assert len(storages) == len(model.state_dict())
        model.load_state_dict(model.state_dict())
    torch.testing.assert_close(lf.fcall(model, moved, x), output)


def test_it_survives_files_merging_and_lora(tmp_path):
    model, x = model_of_two(), torch.randn(3, 4).double()
    params = adapter_of(model)
    expected = lf.fcall(model, params, x)
    lf.save(params, tmp_path / "a", model=model)
    again = lf.load(tmp_path / "a", model=model)
    assert again[KEY].requires_grad
    assert torch.equal(lf.fcall(model, again, x), expected)
    merged = torch.func.functional_call(model, lf.merge(model, params), x)
    torch.testing.assert_close(merged, expected)
    as_lora = lf.to_lora(params, model, 2).params
    torch.testing.assert_close(lf.fcall(model, as_lora, x), expected)


def test_sums_are_refused():
    model = model_of_two()
    with pytest.raises(TypeError, match=r"\*\.tied_lora\.A: .* have no sum; .* to_lora"):
        lf.combine([(adapter_of(model, seed), 0.5) for seed in range(2)])


def test_ranks_of_single_sites_are_refused():
    with pytest.raises(ValueError, match="rank_pattern: the sites of a tied LoRA share A"):
        lf.TiedLoRA(rank_pattern={"0": 3})


def test_two_configs_are_refused():
    cfg = [lf.TiedLoRA(target_modules="^0"), lf.TiedLoRA(target_modules="^1")]
    with pytest.raises(ValueError, match=r"\*.tied_lora.A: two tied_lora configs would share this"):
        lf.init(model_of_two(), cfg)
