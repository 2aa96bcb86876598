"""Skeletons used at the same time: each call sees its own adapter, and a busy copy refuses."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import lora_func as lf
from tests.support.models import scramble
from tests.support.snapshots import assert_same, snapshot

CONFIGS = [lf.LoRA(r=2), lf.DoRA(r=1), lf.OFT(block_size=2), lf.BitFit()]
ADAPTER = st.integers(0, len(CONFIGS) - 1)
HOW = st.sampled_from(["fcall", "vcall", "vmap", "adapted"])
DTYPE = torch.float64
LOCAL = threading.local()


class MishapError(Exception):
    """Raised in the middle of a call."""


class Middle(nn.Module):
    """Waits, or fails, if its thread wants that."""

    def forward(self, x):
        if gate := getattr(LOCAL, "gate", None):
            gate.inside.set()
            assert gate.go.wait(60)
        if getattr(LOCAL, "fails", False):
            raise MishapError
        return x


class Gate:
    def __init__(self):
        self.inside, self.go = threading.Event(), threading.Event()


@dataclass
class Copy:
    """A skeleton, and what it does at present: a blocked call, or an attached adapter."""

    model: nn.Module
    adapter: int = 0
    gate: Gate | None = None
    call: Future | None = None
    handle: lf.Attached | None = None

    @property
    def is_idle(self):
        return self.call is None and self.handle is None


class Skeletons(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Linear(4, 6), Middle(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)
        self.model = nn.Sequential(*layers).to(DTYPE).requires_grad_(False)
        self.x = torch.randn(3, 4, dtype=DTYPE)
        self.before, self.base = snapshot(self.model), self.model(self.x)
        seeded = enumerate(CONFIGS)
        self.adapters = [scramble(lf.init(self.model, c, dtype=DTYPE), seed) for seed, c in seeded]
        self.expected = [lf.fcall(self.model, one, self.x) for one in self.adapters]
        self.gradients = [self.backward(*self.forward(self.model, i)) for i in range(len(CONFIGS))]
        self.pool, self.copies, self.graphs = ThreadPoolExecutor(8), [], []

    def run(self, model, adapter, how, gate=None, fails=False):
        """Call a model with an adapter; return the output."""
        LOCAL.gate, LOCAL.fails = gate, fails
        params, x = self.adapters[adapter], self.x
        try:
            if how == "adapted":
                with lf.adapted(model, params):
                    return model(x)
            if how == "fcall":
                return lf.fcall(model, params, x)
            both = lf.stack([params, params])
            if how == "vcall":
                return lf.vcall(model, both, x)[1]
            return torch.vmap(lf.fcall, (None, 0, None))(model, both, x)[0]
        finally:
            LOCAL.gate, LOCAL.fails = None, False

    def forward(self, model, adapter):
        """Run a model up to the loss; return the loss and the leaves."""
        params = {k: leaf.detach().clone() for k, leaf in self.adapters[adapter].items()}
        leaves = [leaf.requires_grad_() for leaf in lf.partition(params)[0].values()]
        return lf.fcall(model, params, self.x, loss_fn=lambda y, x: y.square().sum()), leaves

    def backward(self, loss, leaves):
        return torch.autograd.grad(loss, leaves)

    def agrees(self, output, adapter):
        torch.testing.assert_close(output, self.expected[adapter], rtol=1e-9, atol=1e-9)

    def drawn(self, data, wanted=lambda copy: True):
        return data.draw(st.sampled_from([copy for copy in self.copies if wanted(copy)]))

    @initialize()
    def begin(self):
        self.copies.append(Copy(lf.skeleton(self.model)))

    @precondition(lambda self: len(self.copies) < 5)
    @rule(data=st.data())
    def copy(self, data):
        of = self.drawn(data)
        if of.is_idle:
            self.copies.append(Copy(lf.skeleton(of.model)))
            return
        with pytest.raises(lf.BusyModelError):
            lf.skeleton(of.model)
        self.copies.append(Copy(lf.skeleton(self.model)))

    @precondition(lambda self: len(self.copies) > 1)
    @rule(data=st.data())
    def forget(self, data):
        copy = self.drawn(data)
        if copy.is_idle:
            self.copies.remove(copy)

    @rule(data=st.data(), adapter=ADAPTER, how=HOW)
    def call(self, data, adapter, how):
        copy = self.drawn(data)
        if copy.is_idle:
            self.agrees(self.run(copy.model, adapter, how), adapter)
            return
        with pytest.raises(lf.BusyModelError):
            self.run(copy.model, adapter, how)

    @rule(data=st.data())
    def call_all_at_once(self, data):
        idle = [copy for copy in self.copies if copy.is_idle]
        what = [(copy.model, data.draw(ADAPTER), data.draw(HOW)) for copy in idle]
        calls = [self.pool.submit(self.run, *each) for each in what]
        for call, (_, adapter, _) in zip(calls, what, strict=True):
            self.agrees(call.result(60), adapter)

    @rule(data=st.data(), adapter=ADAPTER, how=HOW)
    def fail_in_the_middle(self, data, adapter, how):
        copy = self.drawn(data)
        if copy.is_idle:
            with pytest.raises(MishapError):
                self.run(copy.model, adapter, how, fails=True)

    @rule(data=st.data(), adapter=ADAPTER, how=HOW)
    def block(self, data, adapter, how):
        copy = self.drawn(data)
        if copy.is_idle:
            copy.adapter, copy.gate = adapter, Gate()
            copy.call = self.pool.submit(self.run, copy.model, adapter, how, gate=copy.gate)
            assert copy.gate.inside.wait(60)

    @rule(data=st.data(), adapter=ADAPTER)
    def begin_a_step(self, data, adapter):
        copy = self.drawn(data)
        if copy.is_idle:
            self.graphs.append((adapter, self.forward(copy.model, adapter)))

    @precondition(lambda self: self.graphs)
    @rule()
    def end_a_step(self):
        adapter, graph = self.graphs.pop(0)
        torch.testing.assert_close(self.backward(*graph), self.gradients[adapter])

    @rule(data=st.data(), adapter=ADAPTER)
    def attach(self, data, adapter):
        copy = self.drawn(data)
        if copy.is_idle:
            copy.adapter, copy.handle = adapter, lf.attach(copy.model, self.adapters[adapter])
            return
        with pytest.raises(lf.BusyModelError):
            lf.attach(copy.model, self.adapters[adapter])

    @precondition(lambda self: not all(copy.is_idle for copy in self.copies))
    @rule(data=st.data())
    def end(self, data):
        self.finish(self.drawn(data, lambda copy: not copy.is_idle))

    def finish(self, copy):
        """Let a blocked call go on, or remove an adapter."""
        if copy.call is not None:
            copy.gate.go.set()
            output = copy.call.result(60)
        else:
            output = copy.model(self.x)
            copy.handle.remove()
        copy.call = copy.handle = None
        self.agrees(output, copy.adapter)
        assert torch.equal(copy.model(self.x), self.base)

    @invariant()
    def the_original_is_as_it_was(self):
        assert_same(self.before, self.model)
        assert torch.equal(self.model(self.x), self.base)

    def teardown(self):
        for copy in self.copies:
            if not copy.is_idle:
                self.finish(copy)
        self.pool.shutdown()


TestSkeletons = Skeletons.TestCase
TestSkeletons.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[*HealthCheck]
)
