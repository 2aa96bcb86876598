"""One thread per model object; skeletons allow several threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lora_func as lf
from tests.support.models import Gate, batch_for, make
from tests.support.models import lora as adapter
from tests.support.snapshots import assert_same, snapshot


@pytest.fixture
def busy():
    """A model that is running in another thread, blocked inside its forward pass."""
    gate = Gate()
    model = nn.Sequential(nn.Linear(4, 4), gate, nn.Sequential(nn.Linear(4, 4)))
    params, x = adapter(model, r=2), torch.randn(3, 4)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lf.fcall, model, params, x)
        assert gate.inside.wait(60)
        yield model, params, x
        gate.go.set()
        running.result(60)


def test_a_second_thread_is_refused(busy):
    model, params, x = busy
    before = snapshot(model)
    with pytest.raises(lf.BusyModelError, match=r"in another thread.*skeleton\(model\)"):
        lf.fcall(model, params, x)
    with pytest.raises(lf.BusyModelError), lf.adapted(model, params):
        pass
    assert_same(before, model)


def test_a_part_of_the_model_is_the_model(busy):
    model, _, x = busy
    part = model[2]
    with pytest.raises(lf.BusyModelError):
        lf.fcall(part, lf.init(part, lf.LoRA(r=1)), x)


def test_no_skeleton_of_a_running_model(busy):
    model, _, _ = busy
    with pytest.raises(lf.BusyModelError, match="Sequential: is running with an adapter; a copy"):
        lf.skeleton(model)


def test_another_model_is_free(busy):
    _, _, x = busy
    other = nn.Sequential(nn.Linear(4, 4))
    lf.fcall(other, lf.init(other, lf.LoRA(r=1)), x)


def test_the_model_is_free_afterwards():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    params = adapter(model, r=2)
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(lf.fcall, model, params, x).result(60)
    assert torch.equal(lf.fcall(model, params, x), ours)


def test_a_skeleton_shares_every_tensor_and_no_module():
    model = make("bert")
    copy = lf.skeleton(model)
    assert not {id(m) for m in model.modules()} & {id(m) for m in copy.modules()}
    ours, theirs = model.state_dict(keep_vars=True), copy.state_dict(keep_vars=True)
    assert ours.keys() == theirs.keys()
    assert all(ours[key] is theirs[key] for key in ours)


@pytest.mark.parametrize("how", ["fcall", "vmap", "vcall", "checkpointing"])
def test_eight_threads_on_eight_skeletons_give_the_serial_results(how):
    model = make("bert")
    if how == "checkpointing":
        model.train().activation_checkpointing_enable()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    batch, adapters = batch_for(model), [adapter(model, seed=seed) for seed in range(8)]
    over = torch.vmap(lf.fcall, in_dims=(None, 0, None))
    function = {"vmap": over, "vcall": lf.vcall}.get(how, lf.fcall)
    inputs = [lf.stack([one, one]) for one in adapters] if how[0] == "v" else adapters

    def run(model, params, batch):
        loss = function(model, params, batch).sum()
        leaves = [leaf for leaf in params.values() if leaf.requires_grad]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])

    serial = [run(model, one, batch) for one in inputs]
    before = snapshot(model)
    kernels = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    with ThreadPoolExecutor(8) as pool:
        work = [(lf.skeleton(model), one) for one in inputs for _ in range(5)]
        losses = [job.result(120) for job in [pool.submit(run, m, one, batch) for m, one in work]]
    assert kernels == (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    )
    for i, loss in enumerate(losses):
        torch.testing.assert_close(loss, serial[i // 5])
    assert_same(before, model)


def test_no_skeleton_of_a_model_with_an_adapter_attached():
    model = nn.Sequential(nn.Linear(4, 4))
    with lf.attach(model, adapter(model, r=2)):
        with pytest.raises(lf.BusyModelError, match=r"0: has an adapter attached.*remove\(\)"):
            lf.skeleton(model)
    lf.skeleton(model)


def test_attaching_to_a_skeleton_leaves_the_graphs_of_others_valid():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    params = adapter(model, r=2)
    loss = lf.fcall(model, params, x).sum()
    with lf.attach(lf.skeleton(model), params):
        loss.backward()
    assert params["0.lora.A"].grad is not None
