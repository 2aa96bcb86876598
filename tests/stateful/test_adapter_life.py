"""An adapter's life: whatever is done in any order, numbers agree and the base stays."""

import copy
import tempfile
from pathlib import Path
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)
from torch import Tensor, nn
from torch.func import functional_call

import lora_func as lf
from lora_func.adapter import group
from lora_func.variants import by_name
from tests.support.models import scramble
from tests.support.snapshots import assert_same, snapshot

CONFIGS = [
    lf.LoRA(r=1),
    lf.LoRA(r=2, alpha=3.0, target_modules="up|query"),
    lf.DoRA(r=2),
    lf.PiSSA(r=2),
    lf.HRA(r=2),
    lf.OFT(block_size=2),
    lf.SHiRA(r=1),
    lf.IA3(),
    lf.VeRA(r=2),
    lf.BitFit(allow_new_bias=True),
]
WEIGHTS = st.sampled_from([-1.0, 0.5, 1.0])
DTYPE = torch.float64


class Net(nn.Module):
    """Layers with and without bias, one of them called twice."""

    def __init__(self):
        super().__init__()
        self.up, self.query = nn.Linear(6, 8), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = torch.tanh(self.query(torch.tanh(self.up(x))))
        return self.head(y + self.query(y))


WITH_BIAS = Net().to(DTYPE)
WITH_BIAS.query.bias = nn.Parameter(torch.zeros(8, dtype=DTYPE))


class Known(NamedTuple):
    """An adapter, and the state of the model that has it merged."""

    params: lf.Params
    state: dict[str, Tensor]


class Stacked(NamedTuple):
    params: lf.Params
    members: list[Known]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def kinds(params):
    return {name for _, name in group(params)}


def have_a_sum(each):
    """Whether adapters have an exact sum at every site."""
    sites = {}
    for params in each:
        for (site, name), keys in group(params).items():
            leaves = {leaf: params[key] for leaf, key in keys.items()}
            sites.setdefault(site, []).append((by_name(name), leaves))
    return all(map(have_a_sum_here, sites.values()))


def have_a_sum_here(here):
    (variant, first), *_ = here
    if all(other.low_rank for other, _ in here):
        return True
    if variant.neutral is None or any(other is not variant for other, _ in here):
        return False
    constants = first.keys() - variant.neutral.keys()
    return all(torch.equal(leaves[name], first[name]) for _, leaves in here for name in constants)


class Life(RuleBasedStateMachine):
    adapters = Bundle("adapters")
    stacks = Bundle("stacks")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Net().to(DTYPE).requires_grad_(False)
        self.x = torch.randn(3, 6, dtype=DTYPE)
        self.base = self.model(self.x)
        self.before = snapshot(self.model)
        zeros = {"query.bias": torch.zeros(8, dtype=DTYPE)}
        self.state = zeros | {k: v.clone() for k, v in self.model.state_dict().items()}
        self.handle = None

    def known(self, params):
        return Known(params, lf.merge(self.model, params))

    def output(self, known):
        return functional_call(WITH_BIAS, self.state | known.state, (self.x,))

    def agrees(self, known):
        close(lf.fcall(self.model, known.params, self.x), self.output(known))

    def adds_a_bias(self, adapter):
        return "query.bias" in adapter.state and "bitfit" in kinds(adapter.params)

    @property
    def is_free(self):
        return self.handle is None

    @precondition(lambda self: self.is_free)
    @rule(target=adapters, cfg=st.sampled_from(CONFIGS), seed=st.integers(0, 2**20))
    def init(self, cfg, seed):
        fresh = lf.init(self.model, cfg, seed=seed, dtype=DTYPE)
        close(lf.fcall(self.model, fresh, self.x), self.base)
        return self.known(scramble(fresh, seed))

    @precondition(lambda self: self.is_free)
    @rule(adapter=adapters)
    def fcall(self, adapter):
        self.agrees(adapter)

    @precondition(lambda self: self.is_free)
    @rule(target=adapters, adapter=adapters, rate=st.floats(0.01, 0.1))
    def train(self, adapter, rate):
        params = {key: leaf.detach().clone() for key, leaf in adapter.params.items()}
        trained = [leaf.requires_grad_() for leaf in lf.partition(params)[0].values()]
        loss = lf.fcall(self.model, params, self.x, loss_fn=lambda y, x: y.square().mean())
        for leaf, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            leaf.data -= rate * gradient
        return self.known(params)

    @rule(target=adapters, adapter=adapters)
    def save_and_load(self, adapter):
        with tempfile.TemporaryDirectory() as folder:
            lf.save(adapter.params, Path(folder) / "adapter")
            read = lf.load(Path(folder) / "adapter")
        same(read, adapter.params)
        return Known(read, adapter.state)

    @rule(target=stacks, members=st.lists(adapters, min_size=1, max_size=3))
    def stack(self, members):
        each = [member.params for member in members]
        if any(one.keys() != each[0].keys() for one in each):
            with pytest.raises((KeyError, ValueError)):
                lf.stack(each)
            return multiple()
        try:
            stacked = lf.stack(each)
        except ValueError:  # ranks that the variant does not mix
            assert any(a.shape != b[k].shape for b in each for k, a in each[0].items())
            return multiple()
        return Stacked(stacked, members)

    @rule(target=adapters, stack=consumes(stacks))
    def unstack(self, stack):
        found = lf.unstack(stack.params)
        for params, member in zip(found, stack.members, strict=True):
            same(params, member.params)
        return multiple(*(Known(p, m.state) for p, m in zip(found, stack.members, strict=True)))

    @precondition(lambda self: self.is_free)
    @rule(stack=stacks, sweep=st.booleans())
    def call_stack(self, stack, sweep):
        if sweep:
            outputs = lf.vcall(self.model, stack.params, self.x)
        else:
            outputs = torch.vmap(lf.fcall, (None, 0, None))(self.model, stack.params, self.x)
        close(outputs, torch.stack([self.output(member) for member in stack.members]))

    @rule(target=adapters, terms=st.lists(st.tuples(adapters, WEIGHTS), min_size=1, max_size=2))
    def combine(self, terms):
        pairs = [(known.params, weight) for known, weight in terms]
        each = [params for params, _ in pairs]
        if [weight for _, weight in pairs] != [1.0] and not have_a_sum(each):
            with pytest.raises(TypeError, match=r"have no (exact weighted )?sum"):
                lf.combine(pairs)
            return multiple()
        params = lf.combine(pairs)
        state = {
            key: frozen + sum(w * (one.state.get(key, frozen) - frozen) for one, w in terms)
            for key, frozen in self.state.items()
        }
        return Known(params, state)

    @precondition(lambda self: self.is_free)
    @rule(target=adapters, adapter=adapters)
    def to_lora(self, adapter):
        biases = {key for key in adapter.state if key.endswith("bias")}
        if not all(torch.equal(adapter.state[key], self.state[key]) for key in biases):
            with pytest.raises(TypeError, match="changes the bias"):
                lf.to_lora(adapter.params, self.model, 8)
            return multiple()
        found = lf.to_lora(adapter.params, self.model, 8)
        assert kinds(found.params) == {"lora"}
        return Known(found.params, adapter.state)

    @precondition(lambda self: self.is_free)
    @rule(adapter=adapters)
    def attach(self, adapter):
        if self.adds_a_bias(adapter):
            with pytest.raises(TypeError, match="adds a bias, and the layer has none"):
                lf.attach(self.model, adapter.params)
            return
        self.handle = lf.attach(self.model, adapter.params)
        self.attached = adapter
        close(self.model(self.x), self.output(adapter))

    @precondition(lambda self: not self.is_free)
    @rule(adapter=adapters, how=st.sampled_from(["fcall", "attach", "merge", "skeleton"]))
    def refuse_while_attached(self, adapter, how):
        arguments = {"fcall": (adapter.params, self.x), "skeleton": ()}.get(how, (adapter.params,))
        with pytest.raises(lf.BusyModelError):
            getattr(lf, how)(self.model, *arguments)
        close(self.model(self.x), self.output(self.attached))

    @precondition(lambda self: not self.is_free)
    @rule(target=adapters)
    def detach(self):
        found = self.handle.params()
        same(found, self.attached.params)
        self.handle.remove()
        self.handle = None
        return Known(found, self.attached.state)

    @precondition(lambda self: self.is_free)
    @rule(adapter=adapters)
    def merge_for_good(self, adapter):
        if self.adds_a_bias(adapter):
            return
        other = copy.deepcopy(self.model)
        with_merged = lf.attach(other, adapter.params)
        with_merged.remove(merge=True)
        close(other(self.x), self.output(adapter))

    @invariant()
    def the_base_is_as_it_was(self):
        if self.is_free:
            assert_same(self.before, self.model)
            assert torch.equal(self.model(self.x), self.base)

    def teardown(self):
        if not self.is_free:
            self.handle.remove()
            self.handle = None
            self.the_base_is_as_it_was()


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[*HealthCheck]
)
