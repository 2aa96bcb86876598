"""Rules of training against PEFT's optimizers, the authors' formulas, and their own invariances."""

import copy
import math

import peft
import pytest
import torch
from peft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from torch import nn

import lora_func as lf
from lora_func import rules
from tests.support.parity import relative

R, ALPHA, STEPS = 4, 6.0, 20


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 7)).double()


@pytest.fixture
def batch():
    return torch.randn(16, 12, dtype=torch.float64), torch.randn(16, 7, dtype=torch.float64)


def mse(y, target):
    return (y - target).square().mean()


def adapters(model, k=1, cfg=None):
    cfg = lf.LoRA(r=R, alpha=ALPHA) if cfg is None else cfg
    params = [lf.init(model, cfg, seed=seed, dtype=torch.float64) for seed in range(k)]
    with torch.no_grad():
        for i, one in enumerate(params):
            for key, leaf in one.items():
                if key.endswith(".B"):
                    generator = torch.Generator().manual_seed(i)
                    leaf.add_(0.3 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype))
    return params


def gradients_of(model, params, batch):
    trained, constants = lf.partition(params)

    def loss(trained):
        return mse(lf.fcall(model, {**trained, **constants}, batch[0]), batch[1])

    return torch.func.grad(loss)(trained)


def pefts(model, params, **settings):
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0", "2"], **settings)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).double()
    leaves = {}
    for site in ("0", "2"):
        layer = theirs.base_model.model.get_submodule(site)
        for leaf in "AB":
            weight = getattr(layer, f"lora_{leaf}")["default"].weight
            weight.data.copy_(params[f"{site}.lora.{leaf}"])
            leaves[f"{site}.lora.{leaf}"] = weight
    return theirs, leaves


def train(model, params, batch, optimizer, rule=None):
    for _ in range(STEPS):
        optimizer.zero_grad()
        mse(lf.fcall(model, params, batch[0]), batch[1]).backward()
        if rule is not None:
            rules.assign(params, rule(params, rules.gradients(params)))
        optimizer.step()


def train_theirs(theirs, batch, optimizer):
    for _ in range(STEPS):
        optimizer.zero_grad()
        mse(theirs(batch[0]), batch[1]).backward()
        optimizer.step()


def assert_same(params, leaves, tolerance=1e-12):
    assert all(relative(params[key], leaf) < tolerance for key, leaf in leaves.items())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_riemannian_is_pefts(model, batch, optimizer):
    (params,) = adapters(model)
    theirs, leaves = pefts(model, params)
    train_theirs(theirs, batch, create_riemannian_optimizer(theirs, optimizer, lr=1e-2))
    trained, _ = lf.partition(params)
    train(model, params, batch, optimizer(trained.values(), lr=1e-2), rules.riemannian)
    assert_same(params, leaves)


def test_lora_plus_is_pefts(model, batch):
    (params,) = adapters(model)
    theirs, leaves = pefts(model, params)
    settings = {"lr": 1e-3, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.1}
    train_theirs(theirs, batch, create_loraplus_optimizer(theirs, torch.optim.AdamW, **settings))
    groups = rules.groups(params, rules.lora_plus(params, 1e-3, 8.0), weight_decay=0.1)
    train(model, params, batch, torch.optim.AdamW(groups))
    assert_same(params, leaves)


class AdamWithLateEps(torch.optim.Optimizer):
    """Adam as in old transformers: eps is added before the bias is corrected."""

    def __init__(self, params, lr, eps):
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"t": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                state["t"] += 1
                state["m"].lerp_(p.grad, 0.1)
                state["v"].lerp_(p.grad**2, 0.001)
                corrected = math.sqrt(1 - 0.999 ** state["t"]) / (1 - 0.9 ** state["t"])
                p -= group["lr"] * corrected * state["m"] / (state["v"].sqrt() + group["eps"])


def test_lora_fa_is_pefts(model, batch):
    (params,) = adapters(model)
    theirs, leaves = pefts(model, params)
    optimizer = create_lorafa_optimizer(theirs, r=R, lora_alpha=ALPHA, lr=1e-2)
    train_theirs(theirs, batch, optimizer)
    started = {key: leaf.detach().clone() for key, leaf in params.items()}
    trained, _ = lf.partition(params)
    train(model, params, batch, AdamWithLateEps(trained.values(), 1e-2, 1e-6), rules.lora_fa)
    assert_same(params, leaves)
    assert torch.equal(params["0.lora.A"], started["0.lora.A"])
    assert not torch.equal(params["0.lora.B"], started["0.lora.B"])


GRADIENT_RULES = [rules.lora_fa, rules.riemannian, rules.lora_pro]


@pytest.mark.parametrize("rule", GRADIENT_RULES, ids=lambda rule: rule.__name__)
def test_a_stack_follows_a_rule_as_its_members_do(model, batch, rule):
    members = adapters(model, 3)
    grads = [gradients_of(model, one, batch) for one in members]
    each = [rule(one, g) for one, g in zip(members, grads, strict=True)]
    stacked = {key: torch.stack([g[key] for g in grads]) for key in grads[0]}
    together = rule(lf.stack(members), stacked)
    assert together.keys() == each[0].keys()
    for key, gradient in together.items():
        assert relative(gradient, torch.stack([one[key] for one in each])) < 1e-10


def test_members_of_a_stack_may_follow_different_rules(model, batch):
    members = adapters(model, 4)
    grads = [gradients_of(model, one, batch) for one in members]
    stacked = {key: torch.stack([g[key] for g in grads]) for key in grads[0]}
    chosen = [None, *GRADIENT_RULES]
    together = rules.per_member(chosen)(lf.stack(members), stacked)
    for i, rule in enumerate(chosen):
        alone = grads[i] if rule is None else rule(members[i], grads[i])
        for key, gradient in together.items():
            expected = alone.get(key, torch.zeros_like(gradient[i]))
            torch.testing.assert_close(gradient[i], expected)


@pytest.mark.parametrize("rule", GRADIENT_RULES, ids=lambda rule: rule.__name__)
def test_rules_are_finite_at_the_start(model, batch, rule):
    params = lf.init(model, lf.LoRA(r=R), dtype=torch.float64)
    found = rule(params, gradients_of(model, params, batch))
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found["0.lora.B"].any()


def test_other_leaves_pass_through(model, batch):
    cfg = [lf.DoRA(r=2, target_modules="0"), lf.Full(target_parameters="^2")]
    (params,) = adapters(model, cfg=cfg)
    grads = gradients_of(model, params, batch)
    found = rules.riemannian(params, grads)
    assert found.keys() == grads.keys()
    assert found["0.dora.m"] is grads["0.dora.m"]
    assert found["2.full.weight"] is grads["2.full.weight"]
    assert not torch.equal(found["0.dora.B"], grads["0.dora.B"])


def test_the_dtype_of_the_gradients_stays(model, batch):
    model, batch = model.bfloat16(), [t.bfloat16() for t in batch]
    params = lf.init(model, lf.LoRA(r=2), dtype=torch.bfloat16)
    found = rules.lora_pro(params, gradients_of(model, params, batch))
    assert {gradient.dtype for gradient in found.values()} == {torch.bfloat16}


def test_lora_pro_projects_the_full_gradient():
    A, B, G = (torch.randn(s, dtype=torch.float64) for s in ((4, 12), (10, 4), (10, 12)))
    s = 1.5
    params = {".lora.A": A, ".lora.B": B, ".lora._scale": torch.tensor(s)}
    found = rules.lora_pro(params, {".lora.A": s * B.T @ G, ".lora.B": s * G @ A.T}, delta=1e-12)
    change = s * (B @ found[".lora.A"] + found[".lora.B"] @ A)
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    assert relative(change, P_B @ G + (torch.eye(10) - P_B) @ G @ P_A) < 1e-9


def gauged(params, seed):
    """The same products from other factors: ``A ← Q⁻¹ A``, ``B ← B Q``."""
    generator = torch.Generator().manual_seed(seed)
    made = dict(params)
    for site in ("0", "2"):
        Q = torch.eye(R, dtype=torch.float64)
        Q += 0.4 * torch.randn(R, R, generator=generator, dtype=torch.float64)
        made[f"{site}.lora.A"] = torch.linalg.solve(Q, params[f"{site}.lora.A"].detach())
        made[f"{site}.lora.B"] = params[f"{site}.lora.B"].detach() @ Q
    return made


def products(params):
    return [params[f"{site}.lora.B"] @ params[f"{site}.lora.A"] for site in ("0", "2")]


def test_relative_damping_hardly_depends_on_the_factors(model, batch):
    (params,) = adapters(model)
    changes = []
    for one in (params, gauged(params, 0)):
        grads = rules.riemannian(one, gradients_of(model, one, batch), rho=1e-10, relative=True)
        stepped = {key: leaf - 1e-6 * grads.get(key, 0) for key, leaf in one.items()}
        changes.append([a - b for a, b in zip(products(stepped), products(one), strict=True)])
    for a, b in zip(*changes, strict=True):
        assert relative(a, b) < 1e-4


STEP_RULES = {"muon": rules.lora_muon, "rite": rules.lora_rite}


def run(model, params, batch, step, steps=STEPS, **settings):
    state = None
    for _ in range(steps):
        grads = gradients_of(model, params, batch)
        params, state = step(params, grads, state, **settings)
    return params


@pytest.mark.parametrize("name", STEP_RULES)
def test_steps_do_not_depend_on_the_factors(model, batch, name):
    (params,) = adapters(model)
    ours, other = (
        run(model, one, batch, STEP_RULES[name], lr=1e-4) for one in (params, gauged(params, 1))
    )
    before = products(params)
    for a, b, c in zip(products(ours), products(other), before, strict=True):
        assert relative(a - c, b - c) < 1e-2


@pytest.mark.parametrize("name", STEP_RULES)
def test_a_stack_steps_as_its_members_do(model, batch, name):
    members = adapters(model, 3)
    alone = [run(model, one, batch, STEP_RULES[name], lr=1e-2) for one in members]
    stacked, state = lf.stack(members), None
    for _ in range(STEPS):
        each = [gradients_of(model, one, batch) for one in lf.unstack(stacked)]
        grads = {key: torch.stack([g[key] for g in each]) for key in each[0]}
        stacked, state = STEP_RULES[name](stacked, grads, state, lr=1e-2)
    for one, together in zip(alone, lf.unstack(stacked), strict=True):
        assert all(relative(together[key], leaf) < 1e-9 for key, leaf in one.items())


@pytest.mark.parametrize("name", STEP_RULES)
def test_steps_lower_the_loss_from_the_start(model, batch, name):
    params = lf.init(model, lf.LoRA(r=R), dtype=torch.float64)
    before = mse(model(batch[0]), batch[1])
    after = run(model, params, batch, STEP_RULES[name], lr=1e-2)
    assert mse(lf.fcall(model, after, batch[0]), batch[1]) < before
    assert all(leaf.isfinite().all() for leaf in after.values())


def test_the_step_of_muon_has_the_size_that_is_asked_for():
    A, B, G = (torch.randn(s, dtype=torch.float64) for s in ((4, 12), (10, 4), (10, 12)))
    s, lr = 2.0, 0.3
    params = {".lora.A": A, ".lora.B": B, ".lora._scale": torch.tensor(s)}
    grads = {".lora.A": s * B.T @ G, ".lora.B": s * G @ A.T}
    after, _ = rules.lora_muon(params, grads, lr=lr)
    for change in (B @ (after[".lora.A"] - A), (after[".lora.B"] - B) @ A):
        singular = torch.linalg.svdvals(s * change)[:4]
        torch.testing.assert_close(singular, torch.full_like(singular, lr / 2), rtol=1e-3, atol=0)


def test_the_first_step_of_muon_points_where_rites_does():
    A, B, G = (torch.randn(s, dtype=torch.float64) for s in ((4, 12), (10, 4), (10, 12)))
    params = {".lora.A": A, ".lora.B": B, ".lora._scale": torch.tensor(1.5)}
    grads = {".lora.A": 1.5 * B.T @ G, ".lora.B": 1.5 * G @ A.T}
    muon, _ = rules.lora_muon(params, grads)
    rite, _ = rules.lora_rite(params, grads, eps=1e-12, skip=1e9, clip=1e9)
    for key in grads:
        ours, theirs = (after[key] - params[key] for after in (muon, rite))
        assert relative(ours / ours.norm(), theirs / theirs.norm()) < 1e-3


def test_the_decay_of_muon_acts_on_the_product():
    A, B = (torch.randn(s, dtype=torch.float64) for s in ((4, 12), (10, 4)))
    params = {".lora.A": A, ".lora.B": B, ".lora._scale": torch.tensor(2.0)}
    still = {key: torch.zeros_like(leaf) for key, leaf in params.items()}
    after, _ = rules.lora_muon(params, still, lr=0.1, decay=2.0)
    torch.testing.assert_close(after[".lora.B"] @ after[".lora.A"], 0.8 * B @ A)


def test_rates_of_muon_may_differ_in_a_stack(model, batch):
    members, rates = adapters(model, 2), [1e-3, 1e-1]
    stacked = lf.stack(members)
    each = [gradients_of(model, one, batch) for one in members]
    grads = {key: torch.stack([g[key] for g in each]) for key in each[0]}
    together, _ = rules.lora_muon(stacked, grads, lr=torch.tensor(rates))
    for i, one in enumerate(members):
        alone, _ = rules.lora_muon(one, each[i], lr=rates[i])
        assert relative(together["0.lora.B"][i], alone["0.lora.B"]) < 1e-9


def rite_by_hand(factors, grads, state, lr, b1=0.9, b2=0.999, eps=1e-6):
    """The authors' rule for one adapter, with loops."""
    t = state["t"] = state.get("t", 0) + 1
    sides = []
    for i, (A, B) in enumerate(factors):
        for j, (own, other) in enumerate(((A.T, B), (B, A.T))):
            Q, tri = torch.linalg.qr(other)
            inverse = torch.linalg.pinv(tri)
            g = grads[i][j].T if j == 0 else grads[i][j]
            u = g @ inverse
            if u.pow(2).mean().sqrt() > 1:
                u = torch.zeros_like(u)
            sides.append((i, j, own, u, Q, inverse))
    norm = sum(u.pow(2).sum() for *_, u, _, _ in sides).sqrt()
    new = [[None, None] for _ in factors]
    for i, j, own, u, Q, inverse in sides:
        u = u / norm if norm > 1 else u
        m, v, old = state.get((i, j), (torch.zeros_like(u), torch.zeros(R, R), torch.zeros_like(Q)))
        turn = Q.T @ old
        c1, c2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (b1, b2))
        v = (1 - c2) * u.T @ u / len(u) + c2 * turn @ v.to(u) @ turn.T
        w, E = torch.linalg.eigh(v)
        m = (1 - c1) * u @ E @ torch.diag(1 / (w.clamp_min(0).sqrt() + eps)) @ E.T + c1 * m @ turn.T
        state[i, j] = (m, v, Q)
        moved = own - lr * m @ inverse.T
        new[i][j] = moved.T if j == 0 else moved
    return new


def test_rite_is_the_authors(model, batch):
    (params,) = adapters(model)
    ours, state, theirs = params, None, {}
    factors = [[params[f"{site}.lora.{leaf}"].detach() for leaf in "AB"] for site in ("0", "2")]
    for _ in range(STEPS):
        by_hand = {
            f"{site}.lora.{leaf}": factors[i][j]
            for i, site in enumerate(("0", "2"))
            for j, leaf in enumerate("AB")
        }
        g = gradients_of(model, {**params, **by_hand}, batch)
        grads = [[g[f"{site}.lora.{leaf}"] for leaf in "AB"] for site in ("0", "2")]
        factors = rite_by_hand(factors, grads, theirs, lr=1e-2)
        ours, state = rules.lora_rite(ours, gradients_of(model, ours, batch), state, lr=1e-2)
    for i, site in enumerate(("0", "2")):
        for j, leaf in enumerate("AB"):
            assert relative(ours[f"{site}.lora.{leaf}"], factors[i][j]) < 1e-9


@pytest.mark.parametrize("aligned", [True, False])
def test_balance_keeps_the_product(model, aligned):
    members = adapters(model, 3)
    for one in (*members, lf.stack(members)):
        balanced = rules.balance(one, aligned=aligned)
        for site in ("0", "2"):
            A, B = balanced[f"{site}.lora.A"], balanced[f"{site}.lora.B"]
            product = one[f"{site}.lora.B"] @ one[f"{site}.lora.A"]
            assert relative(B @ A, product) < 1e-12
            torch.testing.assert_close(B.mT @ B, A @ A.mT)
        assert balanced["0.lora._scale"] is one["0.lora._scale"]
        assert balanced["0.lora.A"].requires_grad


def test_the_aligned_factors_are_near(model):
    (params,) = adapters(model)

    def distance(other):
        return sum((params[key] - other[key]).norm() for key in params)

    plain, aligned = (rules.balance(params, aligned=a) for a in (False, True))
    assert distance(aligned) < distance(plain)
    torch.testing.assert_close(rules.balance(aligned)["0.lora.A"], aligned["0.lora.A"])


def test_balance_leaves_a_start_alone(model):
    params = lf.init(model, lf.LoRA(r=R))
    balanced = rules.balance(params)
    assert all(torch.equal(balanced[key], leaf) for key, leaf in params.items())


def test_balance_keeps_padded_ranks_at_zero(model):
    small = adapters(model, cfg=lf.LoRA(r=2))[0]
    stacked = rules.balance(lf.stack([small, adapters(model)[0]]))
    first, alone = lf.unstack(stacked)[0], rules.balance(small)
    assert all(relative(first[key], leaf) < 1e-10 for key, leaf in alone.items())
    assert not stacked["0.lora.A"][0, 2:].any()


def test_rates_of_lora_plus(model):
    model = nn.Sequential(nn.Embedding(5, 12), *model)
    cfg = [lf.LoRA(r=2, target_modules="^0$"), lf.DoRA(r=2, target_modules="1")]
    params = lf.init(model, cfg)
    rates = rules.lora_plus(params, 1e-3, 4.0, model=model)
    assert rates == {
        "0.lora.A": 1e-6,
        "0.lora.B": 1e-6,
        "1.dora.A": 1e-3,
        "1.dora.B": 4e-3,
        "1.dora.m": 4e-3,
    }
    head = lf.init(model, lf.Full(target_parameters="^3"), dtype=torch.float64)
    assert rules.lora_plus(head | params, 1e-3, 4.0)["3.full.bias"] == 4e-3
    assert rules.lora_plus(head | params, 1e-3, 4.0)["3.full.weight"] == 1e-3
    stacked = lf.stack([params, params])
    rates = rules.lora_plus(stacked, torch.tensor([1e-3, 1e-2]), 4.0)
    torch.testing.assert_close(rates["1.dora.B"], torch.tensor([4e-3, 4e-2]).reshape(2, 1, 1))
    torch.testing.assert_close(rates["1.dora.m"], torch.tensor([4e-3, 4e-2]).reshape(2, 1))


def test_refusals(model, batch):
    params = lf.init(model, lf.IA3(target_modules="0"))
    with pytest.raises(ValueError, match="no site has trained factors A and B, nothing between"):
        rules.riemannian(params, {})
    for cfg in (lf.AdaLoRA(r=2), lf.KaSA(r=2)):  # whose product is not B A
        with pytest.raises(ValueError, match="nothing between them"):
            rules.balance(lf.init(model, cfg))
    (params,) = adapters(model)
    with pytest.raises(ValueError, match=r"0\.lora\.A: has no gradient; LoRA-Muon moves both"):
        rules.lora_muon(params, {})
    with pytest.raises(KeyError, match=r"'9\.lora\.A' is no key of the adapter"):
        rules.assign(params, {"9.lora.A": torch.zeros(1)})
    with pytest.raises(KeyError, match=r"'9\.lora\.A' is no key of the adapter"):
        rules.groups(params, {"9.lora.A": 1.0})
    with pytest.raises(ValueError, match="rho: got 0"):
        rules.riemannian(params, {}, rho=0)
    with pytest.raises(ValueError, match="ratio: got -1"):
        rules.lora_plus(params, 1e-3, -1)
    with pytest.raises(ValueError, match="beta: got 1"):
        rules.lora_muon(params, {}, beta=1)
    grads = gradients_of(model, params, batch)
    with pytest.raises(ValueError, match=r"decay: got 1.0; times lr = 2.0 it must stay below 1"):
        rules.lora_muon(params, grads, lr=2.0, decay=1.0)
    for step in (rules.lora_muon, rules.lora_rite):
        with pytest.raises(ValueError, match=r"lr: got -1.0, expected numbers above 0"):
            step(params, grads, lr=-1.0)
    stacked = {key: torch.stack([g, g, g]) for key, g in grads.items()}
    with pytest.raises(ValueError, match=r"rules: got 2 for a stack of \[3\] adapters"):
        rules.per_member([None, None])(lf.stack([params] * 3), stacked)
    with pytest.raises(TypeError, match="rates: got tensors; torch's groups take one number"):
        rules.groups(params, rules.lora_plus(params, torch.tensor([1e-3]), 2.0))


def test_experts_and_layers_are_not_mixed():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.layer = nn.Parameter(torch.randn(3, 6, 5)), nn.Linear(5, 6)

    model = Experts()
    cfg = [lf.LoRA(r=2, target_modules=(), target_parameters="^w$"), lf.LoRA(r=2)]
    params = lf.init(model, cfg)
    grads = {key: torch.randn_like(leaf) for key, leaf in lf.partition(params)[0].items()}
    with pytest.raises(ValueError, match="belongs to stacked weights, and"):
        rules.lora_rite(params, grads)
    assert rules.riemannian(params, grads).keys() == grads.keys()


@pytest.mark.parametrize("rule", [rules.lora_fa, rules.lora_pro], ids=lambda rule: rule.__name__)
def test_a_rank_above_the_width_is_no_noise(rule):
    """In float32 as in float64, though the Gram matrix of A is singular."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(0)
        A, B, G = (
            torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)
            for s in ((8, 4), (16, 8), (16, 4))
        )
        params = {".lora.A": A, ".lora.B": B, ".lora._scale": torch.tensor(2.0)}
        made = rule(params, {".lora.A": 2 * B.T @ G, ".lora.B": 2 * G @ A.T})
        found[dtype] = 2 * made[".lora.B"] @ A
        if rule is rules.lora_pro:
            found[dtype] = found[dtype] + 2 * B @ made[".lora.A"]
        torch.testing.assert_close(found[dtype], G, rtol=1e-3, atol=1e-4)  # A spans all inputs


def test_balance_leaves_ranks_above_a_width_alone():
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 4)).double()
    (params,) = adapters(model, cfg=lf.LoRA(r=8))
    balanced = rules.balance(params)
    assert torch.equal(balanced["1.lora.B"], params["1.lora.B"])
    A, B = balanced["0.lora.A"], balanced["0.lora.B"]
    torch.testing.assert_close(A @ A.mT, B.mT @ B)


def padded_stack(members, like):
    """Gradients of members of different ranks as those of their stack."""
    return {
        key: torch.stack([filled(own[key], like[key][0]) for own in members]) for key in members[0]
    }


def filled(small, like):
    made = torch.zeros_like(like)
    made[: small.shape[0], : small.shape[1]] = small
    return made


def assert_first(stacked, alone):
    for key, leaf in alone.items():
        first = stacked[key][0][: leaf.shape[0], : leaf.shape[1]]
        assert relative(first, leaf) < 1e-6, key


def test_padded_ranks_change_no_relative_damping(model, batch):
    members = [adapters(model, cfg=lf.LoRA(r=2))[0], adapters(model)[0]]
    stacked = lf.stack(members)
    each = [gradients_of(model, one, batch) for one in members]
    settings = {"rho": 0.1, "relative": True}
    together = rules.riemannian(stacked, padded_stack(each, stacked), **settings)
    assert_first(together, rules.riemannian(members[0], each[0], **settings))


def test_padded_ranks_change_no_step_of_rite(model, batch):
    members = [adapters(model, cfg=lf.LoRA(r=2))[0], adapters(model)[0]]
    alone, stacked, state = (
        run(model, members[0], batch, rules.lora_rite, steps=6, lr=1e-2),
        lf.stack(members),
        None,
    )
    for _ in range(6):
        each = [gradients_of(model, one, batch) for one in lf.unstack(stacked)]
        grads = padded_stack(each, stacked)
        stacked, state = rules.lora_rite(stacked, grads, state, lr=1e-2)
    assert_first(stacked, lf.partition(alone)[0])
