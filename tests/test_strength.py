"""calibrate_strength: the distance that is asked for, for one adapter and for K."""

import pytest
import torch
from torch import nn

import lora_func as lf
from tests.support.models import batch_for, make, scramble


def divergence(model, params, batches):
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            inputs = {key: t for key, t in batch.items() if key != "labels"}
            base = model(**inputs).logits.log_softmax(-1)
            found = lf.fcall(model, params, inputs).logits.log_softmax(-1)
            mask = inputs.get("attention_mask", torch.ones(base.shape[:-1]))
            total += ((base.exp() * (base - found)).sum(-1) * mask).sum()
            tokens += mask.sum()
    return (total / tokens).item()


@pytest.fixture
def model():
    return make("qwen3").requires_grad_(False).eval()


@pytest.fixture
def batches(model):
    each = []
    for seed in range(2):
        batch = {key: t for key, t in batch_for(model, seed=seed).items() if key != "labels"}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -1] = 0
        each.append(batch)
    return each


@pytest.mark.parametrize("target", [1e-4, 1e-3])
@pytest.mark.parametrize("cfg", [lf.LoRA(r=2), lf.PiSSA(r=2)], ids=["lora", "pissa"])
def test_the_distance_is_the_one_asked_for(model, batches, cfg, target):
    params = scramble(lf.init(model, cfg))
    found, strength = lf.calibrate_strength(model, params, batches, target_kl=target)
    assert divergence(model, found, batches) == pytest.approx(target, rel=0.02)
    assert strength.shape == ()
    assert found.keys() == params.keys()
    changed = {key for key, leaf in params.items() if not torch.equal(found[key], leaf)}
    assert all(key.endswith("._scale") for key in changed)
    assert all(found[key].requires_grad == leaf.requires_grad for key, leaf in params.items())


def test_k_adapters_at_once(model, batches):
    each = [scramble(lf.init(model, lf.LoRA(r=2), seed=seed), seed=seed) for seed in range(3)]
    found, strengths = lf.calibrate_strength(model, lf.stack(each), batches, target_kl=0.01)
    assert strengths.shape == (3,)
    for one, strength, alone in zip(lf.unstack(found), strengths, each, strict=True):
        assert divergence(model, one, batches) == pytest.approx(0.01, rel=0.02)
        _, by_itself = lf.calibrate_strength(model, alone, batches, target_kl=0.01)
        assert strength.item() == pytest.approx(by_itself.item(), rel=0.02)


def test_a_steering_coefficient_is_found(model, batches):
    pairs = [(batches[0], batches[1])]
    params = lf.init(model, lf.SSteer(mode="add", layers=0), data=pairs)
    found, strength = lf.calibrate_strength(model, params, batches, target_kl=1e-3)
    key = next(key for key in params if key.endswith("._coeff"))
    torch.testing.assert_close(found[key], params[key] * strength.to(params[key]))
    assert divergence(model, found, batches) == pytest.approx(1e-3, rel=0.02)


def test_refusals(model, batches):
    start = lf.init(model, lf.LoRA(r=2))
    with pytest.raises(
        ValueError, match=r"target_kl: adapters \[0\] do not reach 0.1 with a stren"
    ):
        lf.calibrate_strength(model, start, batches, target_kl=0.1)
    with pytest.raises(ValueError, match="ia3 has neither a coefficient nor a scale"):
        lf.calibrate_strength(model, lf.init(model, lf.IA3()), batches, target_kl=0.1)
    dora = scramble(lf.init(model, lf.DoRA(r=2)))  # whose magnitudes no scale takes back
    with pytest.raises(
        ValueError, match=r"adapters \[0\] are farther than 1e-05 at a strength of 0"
    ):
        lf.calibrate_strength(model, dora, batches, target_kl=1e-5)
    with pytest.raises(ValueError, match="data: got no batch"):
        lf.calibrate_strength(model, start, [], target_kl=0.1)
    with pytest.raises(TypeError, match="data: got one dict, expected an iterable of batches"):
        lf.calibrate_strength(model, start, batches[0], target_kl=0.1)
    with pytest.raises(ValueError, match="target_kl: got 0"):
        lf.calibrate_strength(model, start, batches, target_kl=0)
    with pytest.raises(ValueError, match="model: is in training mode"):
        lf.calibrate_strength(model.train(), start, batches, target_kl=0.1)


def test_a_masked_class_counts_nothing():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x):
            return self.inner(x).index_fill(-1, torch.tensor([1]), -torch.inf)

    model, x = Masked().eval(), torch.randn(6, 4)
    params = scramble(lf.init(model, lf.LoRA(r=2)))
    found, _ = lf.calibrate_strength(model, params, [x], target_kl=0.05)
    base, other = model(x).softmax(-1), lf.fcall(model, found, x).softmax(-1)
    kl = torch.special.xlogy(base, base / other.clamp_min(1e-30)).sum(-1).mean().item()
    assert kl == pytest.approx(0.05, rel=0.02)


def test_what_no_strength_can_change():
    model, x = nn.Sequential(nn.Linear(4, 1)).eval(), torch.randn(6, 4)
    params = scramble(lf.init(model, lf.LoRA(r=2)))
    with pytest.raises(TypeError, match=r"model: gave \(6, 1\), expected logits"):
        lf.calibrate_strength(model, params, [x], target_kl=0.1)
    params["0.lora._scale"] = torch.zeros(())
    with pytest.raises(ValueError, match="params: every coefficient is zero"):
        lf.calibrate_strength(model, params, [x], target_kl=0.1)


def test_plain_outputs_are_logits():
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(6, 4)
    params = scramble(lf.init(model, lf.LoRA(r=2)))
    found, _ = lf.calibrate_strength(model, params, [x], target_kl=0.2)
    base, other = model(x).log_softmax(-1), lf.fcall(model, found, x).log_softmax(-1)
    kl = (base.exp() * (base - other)).sum(-1).mean().item()
    assert kl == pytest.approx(0.2, rel=0.02)
