"""merge: a model with the merged state dict equals the model with the adapter."""

import copy

import pytest
import torch
from torch import nn

import lora_func as lf
from tests.support.families import EACH_FAMILY, FAMILIES
from tests.support.models import batch_for, make, scramble
from tests.support.pairs import close, each_pair, moved
from tests.support.quantised import KINDS, dequantised, make_quantised
from tests.support.snapshots import assert_same, snapshot


def loaded(model, state):
    """An untied copy of the model that loads this state dict strictly."""
    model = copy.deepcopy(model)
    for path, module in model.named_modules():
        for name, parameter in [*module._parameters.items()]:
            key = f"{path}.{name}" if path else name
            if parameter is not None or key in state:
                setattr(module, name, nn.Parameter(state[key].clone(), requires_grad=False))
    model.load_state_dict(state)
    return model


@each_pair(lambda case: case.has_weight)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_of_every_variant(case, family, dtype):
    model, params, batch = moved(case, family, dtype)
    before = snapshot(model)
    state = lf.merge(model, params)
    assert_same(before, model)
    close(loaded(model, state)(**batch).loss, lf.fcall(model, params, batch), dtype)
    assert {key: tensor.dtype for key, tensor in state.items()} == {
        key: state[key].dtype if key not in model.state_dict() else tensor.dtype
        for key, tensor in model.state_dict().items()
    } | dict.fromkeys(state.keys() - model.state_dict().keys(), dtype)
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in state.values())


@EACH_FAMILY
def test_of_every_family(family):
    model, batch = family.make(), family.batch()
    params = family.adapter(model)
    state = lf.merge(model, params, tied="untie")
    merged = loaded(model, state)
    close(
        lf.fcall(merged, {}, batch, loss_fn=family.loss_fn),
        lf.fcall(model, params, batch, loss_fn=family.loss_fn),
    )


def test_of_trained_parameters():
    model, batch = make("bert").requires_grad_(False), batch_for(make("bert"))
    cfg = [lf.LoRA(r=2), lf.Full(target_parameters="LayerNorm|classifier|embeddings")]
    params = scramble(lf.init(model, cfg))
    close(loaded(model, lf.merge(model, params))(**batch).loss, lf.fcall(model, params, batch))


def test_a_bias_that_the_layer_had_not():
    model, x = nn.Sequential(nn.Linear(4, 3, bias=False)).requires_grad_(False), torch.randn(2, 4)
    params = scramble(lf.init(model, lf.BitFit(allow_new_bias=True)))
    state = lf.merge(model, params)
    assert [*state] == ["0.weight", "0.bias"]
    close(nn.functional.linear(x, state["0.weight"], state["0.bias"]), lf.fcall(model, params, x))


def test_what_is_not_finite_is_refused_on_request():
    model = nn.Sequential(nn.Linear(4, 3))
    params = lf.init(model, lf.LoRA(r=2))
    assert lf.merge(model, params, finite=True).keys() == model.state_dict().keys()
    params["0.lora.B"] = torch.full((3, 2), torch.inf)
    assert not lf.merge(model, params)["0.weight"].isfinite().all()
    with pytest.raises(ValueError, match=r"0\.weight: would hold NaN or infinity"):
        lf.merge(model, params, finite=True)


def test_extra_state_comes_along():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            pass

    model = nn.Sequential(nn.Linear(4, 4), Extra(4, 4)).requires_grad_(False)
    state = lf.merge(model, lf.init(model, lf.LoRA(r=2, target_modules="0")))
    assert state["1._extra_state"] == {"calls": 3}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_of_a_quantised_base(kind, family):
    """All layers get floating-point weights, also the layers without an adapter."""
    model = make_quantised(family, kind).train()  # in training mode 8-bit layers keep exact inputs
    before, batch = snapshot(model), batch_for(model)
    params = scramble(lf.init(model, lf.DoRA(r=2, target_modules=r"q_proj|query|down_proj")))
    state = lf.merge(model, params)
    assert_same(before, model)
    target = dequantised(model)
    assert state.keys() == target.state_dict().keys()
    assert all(tensor.is_floating_point() for tensor in state.values() if tensor.ndim == 2)
    target.load_state_dict(state)
    close(target(**batch).loss, lf.fcall(model, params, batch))


def test_tied_weights():
    family = FAMILIES["gemma3, tied"]
    model, batch = family.make(), family.batch()
    head = scramble(lf.init(model, lf.LoRA(r=2, target_modules="lm_head")))
    with pytest.raises(ValueError, match=r"lm_head\.weight: tied to model\.embed_tokens\.weight"):
        lf.merge(model, head)
    state = lf.merge(model, head, tied="untie")
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    close(loaded(model, state)(**batch).loss, lf.fcall(model, head, batch))
    everywhere = lf.LoRA(r=2, target_modules=(), target_parameters="embed_tokens")
    for cfg in (everywhere, lf.Full(target_parameters="embed_tokens")):
        both = scramble(lf.init(model, cfg))
        state = lf.merge(model, both)
        assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
        close(loaded(model, state)(**batch).loss, lf.fcall(model, both, batch))
    # a tied tensor without an adapter stays tied
    state = lf.merge(model, lf.init(model, lf.LoRA(r=2)))
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]


def test_what_is_refused():
    model = make("qwen3").requires_grad_(False)
    pairs = [(batch_for(model, seed=5), batch_for(model, seed=6))]
    steering = lf.init(model, lf.SSteer(mode="add"), data=pairs)
    with pytest.raises(TypeError, match=r"q_proj: ssteer_add is not linear in x .* adapted"):
        lf.merge(model, steering)
    params = lf.init(model, lf.LoRA(r=2))
    with pytest.raises(ValueError, match=r"q_proj\.lora\.C: lora has no such leaf"):
        lf.merge(model, params | {"model.layers.0.self_attn.q_proj.lora.C": torch.ones(1)})
    with pytest.raises(ValueError, match=r"is a stack of 2 adapters; .* one by one, from unstack"):
        lf.merge(model, {key: leaf.detach() for key, leaf in lf.stack([params, params]).items()})
    with pytest.raises(ValueError, match="tied: got 'maybe'"):
        lf.merge(model, params, tied="maybe")


def test_two_places_of_a_tied_weight_that_differ():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    params = scramble(lf.init(model, lf.LoRA(r=2)))
    with pytest.raises(ValueError, match=r"0\.weight: tied to 1\.weight, .* to other values"):
        lf.merge(model, params)
    state = lf.merge(model, params, tied="untie")
    assert not torch.equal(state["0.weight"], state["1.weight"])
    same = {key: params[key.replace("1", "0", 1)] for key in params}
    merged = lf.merge(model, same)
    assert torch.equal(merged["0.weight"], merged["1.weight"])
