"""A sweep's life: members that come, go, are cloned and resumed learn what they learn alone."""

import copy
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import lora_func as lf
from tests.support.snapshots import assert_same, snapshot

CONFIGS = st.sampled_from(
    [
        lf.LoRA(r=1),
        lf.LoRA(r=3, alpha=6.0),
        lf.DoRA(r=2),
        lf.PiSSA(r=2),
        lf.OFT(block_size=2),
        lf.IA3(),
    ]
)
RATES = st.sampled_from([1e-3, 1e-2])
SEEDS = st.integers(0, 2**20)
CHUNKS = st.sampled_from([None, 1, 2])
DTYPE = torch.float64


def loss_fn(y, x):
    return (y - x[:, :2]).square().mean()


def fresh(params):
    """Leaves of their own with the same numbers."""
    return {
        key: leaf.detach().clone().requires_grad_(leaf.requires_grad)
        for key, leaf in params.items()
    }


def leaves(params):
    return [*lf.partition(params)[0].values()]


class Alone:
    """The twin of a member: the same adapter, trained by itself."""

    def __init__(self, params, rate):
        self.params = fresh(params)
        self.optimizer = torch.optim.AdamW(leaves(self.params), lr=rate)

    def step(self, model, batch):
        self.optimizer.zero_grad()
        lf.fcall(model, self.params, batch, loss_fn=loss_fn).backward()
        self.optimizer.step()

    def clone(self, rate):
        twin = Alone(self.params, rate)
        twin.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        twin.optimizer.param_groups[0]["lr"] = rate
        return twin


class SweepLife(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2, bias=False)
        self.model = nn.Sequential(*layers).to(DTYPE).requires_grad_(False)
        self.before = snapshot(self.model)
        self.members, self.twins, self.steps = [], [], 0
        self.optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
        self.optimizer.param_groups.clear()

    def batch(self):
        generator = torch.Generator().manual_seed(self.steps)
        return torch.randn(3, 4, generator=generator, dtype=DTYPE)

    def append(self, params, rate):
        self.members.append(params)
        self.optimizer.add_param_group({"params": leaves(params), "lr": rate})

    @initialize(cfg=CONFIGS, seed=SEEDS, rate=RATES)
    def begin(self, cfg, seed, rate):
        self.add(cfg, seed, rate)

    @rule(cfg=CONFIGS, seed=SEEDS, rate=RATES)
    def add(self, cfg, seed, rate):
        params = lf.init(self.model, cfg, seed=seed, dtype=DTYPE)
        self.append(params, rate)
        self.twins.append(Alone(params, rate))

    @precondition(lambda self: len(self.members) > 1)
    @rule(data=st.data())
    def drop(self, data):
        i = data.draw(st.integers(0, len(self.members) - 1))
        for leaf in leaves(self.members.pop(i)):
            self.optimizer.state.pop(leaf, None)
        del self.optimizer.param_groups[i], self.twins[i]

    @rule(data=st.data(), rate=RATES)
    def clone(self, data, rate):
        i = data.draw(st.integers(0, len(self.members) - 1))
        old, new = self.members[i], fresh(self.members[i])
        self.append(new, rate)
        for of_old, of_new in zip(leaves(old), leaves(new), strict=True):
            if of_old in self.optimizer.state:
                self.optimizer.state[of_new] = copy.deepcopy(self.optimizer.state[of_old])
        self.twins.append(self.twins[i].clone(rate))

    @rule(data=st.data(), cfg=CONFIGS, seed=SEEDS, rate=RATES)
    def start_again(self, data, cfg, seed, rate):
        if len(self.members) > 1:
            self.drop(data)
        self.add(cfg, seed, rate)

    @rule(chunk=CHUNKS, steps=st.integers(1, 3))
    def train(self, chunk, steps):
        for _ in range(steps):
            batch = self.batch()
            self.optimizer.zero_grad()
            losses = lf.vcall(self.model, self.members, batch, loss_fn=loss_fn, chunk=chunk)
            losses.sum().backward()
            self.optimizer.step()
            for twin in self.twins:
                twin.step(self.model, batch)
            self.steps += 1

    @rule()
    def resume(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "sweep"
            lf.save_training_state(self.members, self.optimizer, path, step=self.steps)
            state = lf.load_training_state(path)
        assert state.step == self.steps
        groups = [{"params": leaves(params)} for params in state.params]
        self.members, self.optimizer = state.params, torch.optim.AdamW(groups)
        self.optimizer.load_state_dict(state.optimizer)

    @invariant()
    def each_member_is_what_it_is_alone(self):
        for member, twin in zip(self.members, self.twins, strict=True):
            torch.testing.assert_close(member, {**twin.params}, rtol=1e-6, atol=1e-9)

    @invariant()
    def the_base_is_as_it_was(self):
        assert_same(self.before, self.model)


TestSweepLife = SweepLife.TestCase
TestSweepLife.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=[*HealthCheck]
)
