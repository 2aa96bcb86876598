"""to_lora gives the nearest LoRA; combine gives an exact weighted sum or an error."""

import pytest
import torch
from torch import nn

import lora_func as lf
from tests.support.cases import CASES
from tests.support.families import FAMILIES
from tests.support.models import batch_for, make, scramble
from tests.support.pairs import adapter
from tests.support.quantised import make_quantised
from tests.support.snapshots import assert_same, snapshot

WITH_WEIGHT = [case for case in CASES if case.has_weight and case.is_adapter]
EACH_VARIANT = pytest.mark.parametrize("case", WITH_WEIGHT, ids=str)


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@EACH_VARIANT
def test_of_full_rank_it_is_the_adapter(case):
    """Qwen3 has no biases; variants that add a bias raise an error."""
    model = make("qwen3", torch.float64).requires_grad_(False)
    if case.bias is True:
        pytest.skip("wants a bias")
    params, batch = scramble(adapter(case, model, dtype=torch.float64)), batch_for(model)
    if case.name in ("ssteer-ablate", "bitfit-new", "lora-bias", "loreft"):
        with pytest.raises(TypeError, match="changes the bias, which a LoRA cannot"):
            lf.to_lora(params, model, 32)
        return
    before = snapshot(model)
    found = lf.to_lora(params, model, 48, tol=1e-9)
    assert_same(before, model)
    close(lf.fcall(model, found.params, batch), lf.fcall(model, params, batch), 1e-9)
    assert max(found.errors.values()) < 1e-9
    assert len(found.errors) == 14


def test_it_is_the_best_of_its_rank():
    model = nn.Linear(6, 5, bias=False, dtype=torch.float64)
    params = scramble(lf.init(model, lf.HRA(r=4), dtype=torch.float64))
    change = lf.merge(model, params)["weight"] - model.weight
    with pytest.raises(ValueError, match=r"a LoRA of rank 2 misses .* more than tol = 0\.001"):
        lf.to_lora(params, model, 2)
    found = lf.to_lora(params, model, 2, tol=1.0)
    S = torch.linalg.svdvals(change)
    close(torch.tensor(found.errors[""]), (S[2:].norm() / S.norm()).float())
    product = found.params[".lora.B"] @ found.params[".lora.A"]
    close((change - product).norm(), S[2:].norm())
    assert found.params[".lora.A"].requires_grad
    assert not found.params[".lora._scale"].requires_grad


def test_rounding_is_no_change():
    """HRA equals the base at initialization up to rounding."""
    model = make("qwen3").requires_grad_(False)
    found = lf.to_lora(lf.init(model, lf.HRA(r=8)), model, 1)
    assert set(found.errors.values()) == {0.0}


def test_a_lora_comes_back():
    model = make("gpt2", torch.float64).requires_grad_(False)
    params = scramble(lf.init(model, lf.LoRA(r=3), dtype=torch.float64))
    found, batch = lf.to_lora(params, model, 3, tol=1e-9), batch_for(model)
    close(lf.fcall(model, found.params, batch), lf.fcall(model, params, batch), 1e-9)


@pytest.mark.parametrize("name", ["qwen3 moe", "vit", "gemma3, tied"])
def test_of_experts_convolutions_and_embeddings(name):
    family = FAMILIES[name]
    model, batch = family.make(), family.batch()
    cfg = [*family.configs(), lf.Full(target_parameters=r"norm(_before|_after|1|2)?\.weight")]
    params = scramble(lf.init(model, cfg))
    found = lf.to_lora(params, model, 64)
    loss = {"loss_fn": family.loss_fn}
    close(
        lf.fcall(model, found.params, batch, **loss), lf.fcall(model, params, batch, **loss), 1e-4
    )


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_of_trained_weights(family):
    """``trained=True`` also converts fully trained weights to a LoRA."""
    model = make(family).requires_grad_(False)
    attention = "q_proj" if family == "qwen3" else r"c_attn\.weight"
    cfg = lf.Full(target_parameters=f"{attention}|norm|ln_")
    params, batch = scramble(lf.init(model, cfg)), batch_for(model)
    kept = lf.to_lora(params, model, 32)
    assert {*kept.params} == {*params}
    assert not kept.errors
    found = lf.to_lora(params, model, 32, trained=True)
    assert len(found.errors) == 2
    close(lf.fcall(model, found.params, batch), lf.fcall(model, params, batch), 1e-4)
    if family == "gpt2":
        with_bias = scramble(lf.init(model, lf.Full(target_parameters="c_attn")))
        with pytest.raises(TypeError, match="c_attn: full changes the bias"):
            lf.to_lora(with_bias, model, 32, trained=True)


def test_on_a_quantised_base():
    model = make_quantised("qwen3", "nf4")
    params, batch = scramble(lf.init(model, lf.DoRA(r=2))), batch_for(model)
    found = lf.to_lora(params, model, 48)
    close(lf.fcall(model, found.params, batch), lf.fcall(model, params, batch), 1e-4)


def test_what_has_no_lora():
    model = make("bert").requires_grad_(False)
    with pytest.raises(TypeError, match=r"query: ia3 changes the bias"):
        lf.to_lora(scramble(lf.init(model, lf.IA3())), model, 4)
    params = lf.init(model, lf.LoRA(r=2))
    with pytest.raises(ValueError, match="rank: got 0"):
        lf.to_lora(params, model, 0)
    with pytest.raises(ValueError, match="is a stack"):
        lf.to_lora(lf.stack([params, params]), model, 2)
    pairs = [(batch_for(model, seed=5), batch_for(model, seed=6))]
    steering = lf.init(model, lf.SSteer(mode="add", layers=(0, 1)), data=pairs)
    with pytest.raises(TypeError, match="is not linear in x and has no weight"):
        lf.to_lora(steering, model, 4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_of_weight_one_is_itself(case):
    family = "bert" if case.bias else "qwen3"
    model = make(family).requires_grad_(False)
    params = lf.init(model, case.config(2)) if "full" in case.name else adapter(case, model)
    found = lf.combine([(params, 1.0)])
    assert [*found] == [*params]
    for key, leaf in params.items():
        assert torch.equal(found[key], leaf)
        assert found[key] is not leaf
        assert found[key].requires_grad == leaf.requires_grad


def change(model, params):
    """The difference between every merged and frozen parameter."""
    merged, own = lf.merge(model, params), model.state_dict()
    return {key: merged[key] - own[key] for key in own}


LINEAR = {
    "lora": (lf.LoRA(r=2, alpha=3), lf.LoRA(r=3, alpha=1)),
    "lora, eva, pissa": (lf.PiSSA(r=2), lf.LoRA(r=3), lf.EVA(r=1)),
    "bitfit": (lf.BitFit(), lf.BitFit()),
    "ia3": (lf.IA3(), lf.IA3()),
    "ia3_ff": (lf.IA3FF(), lf.IA3FF()),
}


@pytest.mark.parametrize("name", LINEAR)
def test_the_sum_of_changes_is_the_change_of_the_sum(name):
    model = make("bert", torch.float64).requires_grad_(False)
    data = [batch_for(model)]
    terms = []
    for k, cfg in enumerate(LINEAR[name]):
        given = data if isinstance(cfg, lf.EVA) else None
        params = lf.init(model, cfg, seed=k, dtype=torch.float64, data=given)
        terms.append((scramble(params, k), (0.5, -1.0, 2.0)[k]))
    expected = {key: torch.zeros_like(t) for key, t in model.state_dict().items()}
    for params, weight in terms:
        for key, tensor in change(model, params).items():
            expected[key] = expected[key] + weight * tensor
    close(change(model, lf.combine(terms)), expected, 1e-9)
    close(change(model, lf.combine(terms[::-1])), expected, 1e-9)


def test_sums_of_sparse_adapters_want_the_same_entries():
    model = make("qwen3", torch.float64).requires_grad_(False)
    one, other = (lf.init(model, lf.SHiRA(r=1), seed=s, dtype=torch.float64) for s in range(2))
    first, second = scramble(dict(one)), scramble({k: v.clone() for k, v in one.items()}, 1)
    with torch.no_grad():
        terms = [
            ({k: v.detach().clone() for k, v in p.items()}, w)
            for p, w in ((first, 2.0), (second, 3.0))
        ]
    expected = {
        key: 2 * a + 3 * b
        for (key, a), b in zip(
            change(model, terms[0][0]).items(), change(model, terms[1][0]).values(), strict=True
        )
    }
    close(change(model, lf.combine(terms)), expected, 1e-9)
    with pytest.raises(TypeError, match="with different _indices have no sum of the same kind"):
        lf.combine([(one, 1.0), (other, 1.0)])


def test_sites_that_only_some_have():
    model = make("qwen3", torch.float64).requires_grad_(False)
    q, v = (
        scramble(lf.init(model, lf.LoRA(r=2, target_modules=name), dtype=torch.float64))
        for name in ("q_proj", "v_proj")
    )
    found = lf.combine([(q, 2.0), (v, 1.0)])
    expected = {
        key: 2 * a + b
        for (key, a), b in zip(change(model, q).items(), change(model, v).values(), strict=True)
    }
    close(change(model, found), expected, 1e-9)


def test_what_is_no_sum():
    model = make("qwen3").requires_grad_(False)
    for config in (lf.DoRA, lf.HRA, lf.VeRA, lf.DeLoRA):
        params = lf.init(model, config(r=2))
        with pytest.raises(TypeError, match="have no exact weighted sum; make LoRAs of them"):
            lf.combine([(params, 0.5), (params, 0.5)])
        with pytest.raises(TypeError, match="have no exact weighted sum"):
            lf.combine([(params, 0.5)])
    with pytest.raises(TypeError, match=r"of \['ia3', 'lora'\] have no exact"):
        lf.combine([(lf.init(model, lf.LoRA(r=2)), 1.0), (lf.init(model, lf.IA3()), 1.0)])
    one = lf.init(model, lf.LoRA(r=2))
    for config in (lf.LoRA(r=2), lf.IA3()):
        one = lf.init(model, config)
        with pytest.raises(ValueError, match=r"stacks|has shapes"):
            lf.combine([(one, 1.0), (lf.stack([one, one]), 1.0)])
    with pytest.raises(ValueError, match="terms: got none"):
        lf.combine([])
