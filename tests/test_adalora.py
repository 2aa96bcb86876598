"""AdaLoRA's schedule against PEFT's RankAllocator, step by step."""

import copy

import peft
import pytest
import torch
from torch import nn

import lora_func as lf
from lora_func.peft import from_peft, to_peft
from lora_func.rules import adalora
from tests.support.parity import relative

K, R, TARGET, TOTAL = 3, 6, 2, 40
SETTINGS = {"target_r": TARGET, "tinit": 4, "tfinal": 6}
SCHEDULE = adalora.Schedule(total=TOTAL, delta_t=3, **SETTINGS)
SITES = ("0", "2")


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 7)).double()


@pytest.fixture
def batch():
    return torch.randn(16, 12, dtype=torch.float64), torch.randn(16, 7, dtype=torch.float64)


def started(model, k):
    return [lf.init(model, lf.AdaLoRA(r=R), seed=seed, dtype=torch.float64) for seed in range(k)]


def pefts(model, params):
    config = peft.AdaLoraConfig(
        init_r=R, target_modules=list(SITES), total_step=TOTAL, deltaT=3, **SETTINGS
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config).double()
    leaves = {}
    for site in SITES:
        layer = theirs.base_model.model.get_submodule(site)
        for leaf in "ABE":
            parameter = getattr(layer, f"lora_{leaf}")["default"]
            parameter.data.copy_(params[f"{site}.adalora.{leaf}"].reshape(parameter.shape))
            leaves[f"{site}.adalora.{leaf}"] = parameter
        layer.ranknum["default"].requires_grad_(False)  # PEFT trains it on a float64 base
    return theirs, leaves


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_a_stack_is_pruned_as_pefts_adapters_are(model, batch, penalty):
    members, (x, target) = started(model, K), batch
    others = [pefts(model, one) for one in members]
    trained, constants = lf.partition(lf.stack(members))
    trained = {key: leaf.detach().requires_grad_() for key, leaf in trained.items()}
    stacked, state = {**trained, **constants}, None
    optimizers = [torch.optim.AdamW(leaves.values(), lr=3e-2) for _, leaves in others]
    ours = torch.optim.AdamW(trained.values(), lr=3e-2)
    for step in range(TOTAL):
        for (theirs, leaves), optimizer in zip(others, optimizers, strict=True):
            optimizer.zero_grad()
            loss = (theirs(x) - target).square().mean()
            covariances = [
                leaf @ leaf.T if key.endswith("A") else leaf.T @ leaf
                for key, leaf in leaves.items()
                if key[-1] in "AB"
            ]
            eye = torch.eye(R, dtype=torch.float64)
            loss = loss + penalty * sum((c - eye).norm() for c in covariances) / len(covariances)
            loss.backward()
            optimizer.step()
            theirs.base_model.update_and_allocate(step)
        ours.zero_grad()
        losses = lf.vcall(model, stacked, x, loss_fn=lambda y, _: (y - target).square().mean())
        (losses + penalty * adalora.orthogonality(stacked)).sum().backward()
        grads = {key: leaf.grad for key, leaf in trained.items()}
        ours.step()
        masked, state = adalora.update(stacked, grads, state, step, SCHEDULE)
        with torch.no_grad():
            for key, leaf in trained.items():
                leaf.copy_(masked[key])
        for i, (_, leaves) in enumerate(others):
            for key, leaf in leaves.items():
                value = stacked[key][i].reshape(leaf.shape)
                assert torch.equal(value == 0, leaf == 0), f"{key} at step {step}"
                assert relative(value, leaf) < 1e-10 or not leaf.any()
    kept = sum(stacked[f"{site}.adalora.E"].count_nonzero(-1) for site in SITES)
    assert kept.tolist() == [TARGET * len(SITES)] * K


@pytest.mark.parametrize("step", range(TOTAL + 3))
def test_the_budget_is_pefts(model, step):
    theirs, _ = pefts(model, started(model, 1)[0])
    expected, _ = theirs.base_model.rankallocator.budget_schedule(step)
    assert adalora.budget(step, SCHEDULE, R * 2, TARGET * 2) == expected


def test_budgets_may_differ_in_a_stack():
    scores = {"a": torch.rand(3, 5), "b": torch.rand(3, 4)}
    keep = adalora.allocate(scores, torch.tensor([9, 0, 4]))
    assert sum(own.sum(-1) for own in keep.values()).tolist() == [9, 0, 4]
    best = torch.cat([*scores.values()], -1)[2].topk(4).values.min()
    assert all(torch.equal(keep[site][2], own[2] >= best) for site, own in scores.items())
    with pytest.raises(ValueError, match="kept: got 10, expected at least 0 and at most 9"):
        adalora.allocate(scores, 10)


def test_a_site_without_triplets_is_kept_in_files(model, tmp_path):
    (params,) = started(model, 1)
    cut = {key: leaf.detach() for key, leaf in params.items()}
    for leaf in "AE":
        cut[f"0.adalora.{leaf}"] = cut[f"0.adalora.{leaf}"][:0]
    cut["0.adalora.B"] = cut["0.adalora.B"][:, :0]
    lf.save(cut, tmp_path / "cut.safetensors", model=model)
    again = lf.load(tmp_path / "cut.safetensors", model=model)
    assert again["0.adalora.A"].shape == (0, 12)
    x = torch.randn(3, 12, dtype=torch.float64)
    assert torch.equal(lf.fcall(model, again, x), model(x))


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes a rank of 0 for damage
@pytest.mark.parametrize("kept", [2, 0])
def test_pruned_checkpoints_of_peft_are_read(model, batch, kept, tmp_path):
    theirs, leaves = pefts(model, started(model, 1)[0])
    with torch.no_grad():
        for key, leaf in leaves.items():
            leaf.normal_()
            if key == "0.adalora.E":
                leaf[kept:] = 0
    pattern = {f"{s}.lora_E.default": (leaves[f"{s}.adalora.E"] != 0)[:, 0].tolist() for s in SITES}
    theirs.peft_config["default"].rank_pattern = pattern
    x, _ = batch
    expected = theirs(x)
    theirs.save_pretrained(tmp_path)
    params = from_peft(tmp_path, model)
    assert params["0.adalora.A"].shape == (kept, 12)
    torch.testing.assert_close(lf.fcall(model, params, x), expected)
    to_peft(params, tmp_path / "again", model=model)  # PEFT has one rank: zeros fill it up
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "again").double()
    torch.testing.assert_close(again(x), expected)


def test_no_step_is_left_out(model, batch):
    (params,) = started(model, 1)
    grads = {key: torch.ones_like(leaf) for key, leaf in lf.partition(params)[0].items()}
    with pytest.raises(ValueError, match="step: got 7 without a state; call update after each"):
        adalora.update(params, grads, None, 7, SCHEDULE)
    still = {key: torch.zeros_like(leaf) for key, leaf in grads.items()}
    at_once = adalora.Schedule(total=5, target_r=1)
    _, silent = adalora.update(params, still, None, 0, at_once)
    with pytest.raises(ValueError, match="step 1: every score of an adapter is zero"):
        adalora.update(params, still, silent, 1, at_once)
    _, state = adalora.update(params, grads, None, 0, SCHEDULE)
    with pytest.raises(ValueError, match="step: got 2 after 0; call update after each step"):
        adalora.update(params, grads, state, 2, SCHEDULE)
    with pytest.raises(ValueError, match=r"0\.adalora\.A: has no gradient"):
        adalora.update(params, {}, state, 1, SCHEDULE)
    with pytest.raises(ValueError, match="target_r: 6 at each of 2 sites is no fewer than the 12"):
        adalora.update(params, grads, None, 0, adalora.Schedule(total=5, target_r=6))
    with pytest.raises(ValueError, match="no site is adapted by AdaLoRA"):
        adalora.orthogonality(lf.init(model, lf.LoRA(r=2)))


def test_half_precision_keeps_its_scores(model):
    params = {key: leaf.half() for key, leaf in started(model, 1)[0].items()}
    params |= {key: leaf + 0.03 for key, leaf in params.items() if key.endswith(".E")}
    grads = {key: torch.full_like(leaf, 1e-3) for key, leaf in lf.partition(params)[0].items()}
    state, schedule = None, adalora.Schedule(total=30, target_r=1)
    for step in range(2):
        params, state = adalora.update(params, grads, state, step, schedule)
    assert params["0.adalora.E"].any()


def test_members_of_different_ranks_are_as_alone(model):
    alone = lf.init(model, lf.AdaLoRA(r=2), dtype=torch.float64)
    large = lf.init(model, lf.AdaLoRA(r=6), seed=1, dtype=torch.float64)
    stacked, schedule = lf.stack([alone, large]), adalora.Schedule(total=10, target_r=1)
    torch.testing.assert_close(adalora.orthogonality(stacked)[0], adalora.orthogonality(alone))
    state = both = None
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        drawn = {
            key: torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            for key, leaf in lf.partition(alone)[0].items()
        }
        padded = {key: torch.ones_like(stacked[key]) for key in drawn}
        for key, gradient in drawn.items():
            padded[key][0] = 0
            padded[key][0][tuple(slice(n) for n in gradient.shape)] = gradient
        alone = {k: v + 0.1 * drawn[k] if k in drawn else v for k, v in alone.items()}
        stacked = {k: v + 0.1 * padded[k] if k in padded else v for k, v in stacked.items()}
        alone, state = adalora.update(alone, drawn, state, step, schedule)
        stacked, both = adalora.update(stacked, padded, both, step, schedule)
        for key in (f"{site}.adalora.E" for site in SITES):
            assert torch.equal(stacked[key][0][:2] == 0, alone[key] == 0), step


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total": 0}, "total: got 0"),
        ({"total": 5, "tinit": 2, "tfinal": 3}, r"tinit: 2 \+ tfinal 3 leave no step of 5"),
        ({"total": 5, "beta1": 1.0}, "beta1: got 1.0, expected below 1"),
    ],
)
def test_schedules_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        adalora.Schedule(**settings)
