"""Sums of adapters by PEFT's methods, against PEFT."""

import copy

import peft
import pytest
import torch
from torch import nn

import lora_func as lf
from lora_func.adapter import METHODS
from tests.support.parity import relative

WEIGHTS = [1.5, -0.5, 0.7]
PRUNING = [m for m in METHODS if "ties" in m or "dare" in m or "prune" in m]


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(14, 10)).requires_grad_(False)


def members(model, cfg, k=3):
    made = [lf.init(model, cfg, seed=seed) for seed in range(k)]
    with torch.no_grad():
        for i, one in enumerate(made):
            generator = torch.Generator().manual_seed(i)
            for leaf in lf.partition(one)[0].values():
                leaf.add_(torch.randn(leaf.shape, generator=generator))
    return made


def pefts(model, each, config):
    """PEFT's model with an adapter "0", "1", ... for each of ours."""
    theirs = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="0")
    layer = theirs.base_model.model[0]
    for i, one in enumerate(each):
        if i:
            theirs.add_adapter(str(i), config)
        for key, leaf in lf.partition(one)[0].items():
            name = key.rpartition(".")[2]
            if name == "g":
                layer.ia3_l[str(i)].data.copy_(leaf.reshape(layer.ia3_l[str(i)].shape))
            else:
                getattr(layer, f"lora_{name}")[str(i)].weight.data.copy_(leaf)
    return theirs, layer


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "sum" and "dare" not in m])
def test_parity_with_peft(model, method, majority):
    each = members(model, lf.LoRA(r=3, alpha=6))
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    theirs, layer = pefts(model, each, config)
    density = 0.6 if method in PRUNING else None
    theirs.add_weighted_adapter(
        ["0", "1", "2"],
        WEIGHTS,
        "sum",
        combination_type=method,
        density=density,
        majority_sign_method=majority,
    )
    terms = [*zip(each, WEIGHTS, strict=True)]
    ours = lf.combine(terms, method, density=density, majority=majority)
    change = ours["0.lora._scale"] * ours["0.lora.B"] @ ours["0.lora.A"]
    assert relative(change, layer.get_delta_weight("sum")) < 1e-5


@pytest.mark.parametrize("method", [m for m in METHODS if "dare" in m])
def test_dare_drops_by_its_own_seed(model, method, monkeypatch):
    each = members(model, lf.LoRA(r=3))
    terms = [*zip(each, WEIGHTS, strict=True)]
    torch.manual_seed(0)
    one, again, other = (lf.combine(terms, method, density=0.5, seed=s) for s in (0, 0, 1))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one["0.lora.A"], again["0.lora.A"])
    assert not torch.equal(one["0.lora.A"], other["0.lora.A"])
    drawn, theirs = [], []
    bernoulli = torch.bernoulli
    monkeypatch.setattr(
        torch, "bernoulli", lambda *a, **k: drawn.append(bernoulli(*a, **k)) or drawn[-1]
    )
    ours = lf.combine(terms, method, density=0.5)
    masks = iter(drawn)
    monkeypatch.setattr(torch, "bernoulli", lambda *a, **k: theirs.append(1) or next(masks))
    model_of_peft, layer = pefts(
        model, each, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    )
    model_of_peft.add_weighted_adapter(
        ["0", "1", "2"], WEIGHTS, "sum", combination_type=method, density=0.5
    )
    change = ours["0.lora._scale"] * ours["0.lora.B"] @ ours["0.lora.A"]
    assert relative(change, layer.get_delta_weight("sum")) < 1e-5
    assert len(theirs) == len(drawn)


def test_dare_keeps_the_sum_on_average(model):
    each = members(model, lf.LoRA(r=3))
    terms = [*zip(each, WEIGHTS, strict=True)]
    exact = lf.combine(terms)
    exact = exact["0.lora.B"] @ exact["0.lora.A"]
    sums = []
    for seed in range(400):
        one = lf.combine(terms, "dare_linear_svd", density=0.7, rank=10, seed=seed)
        sums.append(one["0.lora.B"] @ one["0.lora.A"])
    assert relative(torch.stack(sums).mean(0), exact) < 0.1


def test_both_sums_of_ia3(model):
    each = members(model, lf.IA3(target_modules="0"))
    theirs, layer = pefts(model, each, peft.IA3Config(target_modules=["0"], feedforward_modules=[]))
    theirs.add_weighted_adapter(["0", "1", "2"], WEIGHTS, "sum")
    terms = [*zip(each, WEIGHTS, strict=True)]
    linear = lf.combine(terms, "linear")["0.ia3.g"]
    torch.testing.assert_close(linear, layer.ia3_l["sum"].flatten())
    around = lf.combine(terms)["0.ia3.g"]
    torch.testing.assert_close(around, linear + (1 - sum(WEIGHTS)))
    equal = [*zip(each, [0.5, 0.2, 0.3], strict=True)]
    torch.testing.assert_close(lf.combine(equal)["0.ia3.g"], lf.combine(equal, "linear")["0.ia3.g"])


def test_pruned_gains_stay_around_one(model):
    each = members(model, lf.IA3(target_modules="0"))
    merged = lf.combine([(each[0], 1.0)], "magnitude_prune", density=0.3)["0.ia3.g"]
    assert (merged == 1).sum() == 7


def test_ranks_may_differ_where_the_change_is_merged(model):
    one, two = members(model, lf.LoRA(r=2), 1) + members(model, lf.PiSSA(r=4), 1)
    terms = [(one, 1.0), (two, 1.0)]
    exact = lf.combine(terms)
    whole = lf.combine(terms, "svd", rank=10)
    close = lf.combine(terms, "svd")
    assert close["0.lora.A"].shape == (8, 14)  # a PiSSA of rank 4 is a change of rank 8
    change = exact["0.lora.B"] @ exact["0.lora.A"]
    assert relative(whole["0.lora.B"] @ whole["0.lora.A"], change) < 1e-5


def test_at_least_one_entry_stays(model):
    (one,) = members(model, lf.LoRA(r=2), 1)
    merged = lf.combine([(one, 1.0)], "magnitude_prune", density=1e-6)
    assert merged["0.lora.A"].count_nonzero() == merged["0.lora.B"].count_nonzero() == 1


def test_refusals(model):
    one, two = members(model, lf.LoRA(r=2), 1) + members(model, lf.LoRA(r=3), 1)
    with pytest.raises(ValueError, match=r"0: A has shapes \[\(2, 14\), \(3, 14\)\]; factors"):
        lf.combine([(one, 1.0), (two, 1.0)], "ties", density=0.5)
    pissa = members(model, lf.PiSSA(r=2), 2)
    with pytest.raises(TypeError, match=r"0: adapters of \['pissa'\] have no exact weighted sum"):
        lf.combine([(pissa[0], 1.0), (pissa[1], 1.0)], "linear")
    hra = members(model, lf.HRA(r=2), 2)
    with pytest.raises(TypeError, match=r"0: adapters of \['hra'\] are no products of two factors"):
        lf.combine([(hra[0], 1.0), (hra[1], 1.0)], "ties_svd", density=0.5)
    tied = members(model, lf.TiedLoRA(r=2), 2)
    with pytest.raises(
        TypeError, match=r"\*\.tied_lora\.A: adapters of tied_lora whose sites share"
    ):
        lf.combine([(tied[0], 1.0), (tied[1], 1.0)])
    for method in ("svd", "linear"):
        with pytest.raises(ValueError, match="single adapters of single weights; unstack them"):
            lf.combine([(lf.stack([one, one]), 1.0)], method)
    with pytest.raises(ValueError, match="weight: got nan"):
        lf.combine([(one, float("nan")), (one, 1.0)])
    for settings, message in [
        ({"method": "mean"}, "method: got 'mean'"),
        ({"method": "ties"}, "density: got None; 'ties' needs a share of entries to keep"),
        ({"method": "sum", "density": 0.5}, "density: got 0.5; 'sum' leaves nothing out"),
        ({"method": "ties", "density": 2.0}, "density: got 2.0, expected at most 1"),
        ({"method": "linear", "rank": 2}, "rank: got 2; 'linear' does not choose a rank"),
        ({"method": "svd", "rank": 0}, "rank: got 0"),
        ({"method": "ties", "density": 0.5, "majority": "most"}, "majority: got 'most'"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            lf.combine([(one, 1.0)], **settings)
