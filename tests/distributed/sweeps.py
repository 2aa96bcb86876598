"""Data parallelism without a module, members over ranks, one start from data on several ranks."""

import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import lora_func as lf
from lora_func.distributed import gathered, share, synced
from tests.distributed.support import adapter, batch, close, gradients, model, rank, sharded


def case_gradients_are_averaged_over_the_ranks():
    base, data, params = model(), batch(), adapter()
    half = {name: rows.chunk(2)[rank()] for name, rows in data.items()}
    expected = gradients(params, lf.fcall(base, params, data))
    for each in (base, sharded()):
        close(gradients(params, lf.fcall(each, synced(params), half)), expected)
        swept = lf.vcall(each, lf.stack([synced(params), adapter(seed=2)]), half)
        close(gradients(params, swept.sum()), expected)
    point = {key: leaf.detach() for key, leaf in params.items()}

    def loss(params):
        return lf.fcall(base, synced(params), half)

    constants = lf.partition(point)[1]
    found = torch.func.grad(loss)(point)
    close({key: found[key] for key in expected}, expected)
    assert all(found[key].eq(0).all() for key in constants)


def case_gradients_are_averaged_under_vmap():
    base, data = model(), batch()
    half = {name: rows.chunk(2)[rank()] for name, rows in data.items()}
    stack = lf.stack([{k: v.detach() for k, v in adapter(seed=s).items()} for s in range(2)])
    found = torch.vmap(torch.func.grad(lambda p: lf.fcall(base, synced(p), half)))(stack)
    expected = torch.vmap(torch.func.grad(lambda p: lf.fcall(base, p, data)))(stack)
    close(found, expected)
    with pytest.raises(TypeError, match="expected a list of adapters"):
        gathered(stack)


def case_a_sweep_over_ranks_is_the_sweep():
    base, data = model(), batch()

    def train(members):
        each = [adapter(seed=seed) for seed in members]
        optimizers = [torch.optim.AdamW(lf.partition(one)[0].values(), lr=1e-2) for one in each]
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            lf.vcall(base, lf.stack(each), data).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
        return each

    mine = share(range(5))
    assert [index for index, member in mine] == ([0, 1], [2, 3, 4])[rank()]
    everyone = gathered(train([member for _, member in mine]))
    close(everyone, train(range(5)))
    assert all(one["model.layers.0.mlp.up_proj.lora.A"].requires_grad for one in everyone)
    assert share([], None) == []
    assert len(gathered([adapter()] if rank() else [])) == 1


def case_calibration_is_one_start():
    base, data = model(), batch()
    batches = [data, {name: rows.flip(0) for name, rows in data.items()}, batch(2)]
    for cfg in (
        lf.EVA(r=2, target_modules=r"q_proj$"),
        lf.AntiPaSTO(r=4, block_size=2, target_modules=r"q_proj$"),
        lf.SHiRA(r=1, mask="snip", target_modules=r"q_proj$"),
    ):
        expected = lf.init(base, cfg, data=batches)
        found = lf.init(base, cfg, data=batches[rank() :: 2], group=dist.group.WORLD)
        close(
            {k: v.abs() for k, v in found.items()}, {k: v.abs() for k, v in expected.items()}, 1e-3
        )
        same = [None, None]
        dist.all_gather_object(same, found)
        close(same[0], same[1], 0)


def case_a_rank_without_data_ends_all_ranks():
    base, cfg = model(), lf.EVA(r=2, target_modules=r"q_proj$")
    with pytest.raises((ValueError, RuntimeError), match="saw nothing of 0 batches"):
        lf.init(base, cfg, data=[batch()] * rank(), group=dist.group.WORLD)


def case_a_stack_that_is_spread_over_its_adapters_is_a_stack():
    base, data = model(), batch()
    mesh = init_device_mesh("cpu", (2,))
    plain = lf.stack([adapter(seed=seed) for seed in range(5)])
    plain = {k: v.detach().requires_grad_("._" not in k) for k, v in plain.items()}
    spread = {
        key: distribute_tensor(leaf.detach(), mesh, [Shard(0)]).requires_grad_(leaf.requires_grad)
        for key, leaf in plain.items()
    }
    losses, expected = lf.vcall(base, spread, data), lf.vcall(base, plain, data)
    close(losses.full_tensor(), expected)
    optimizers = [torch.optim.AdamW(lf.partition(s)[0].values(), lr=1e-2) for s in (spread, plain)]
    for loss, optimizer in zip((losses, expected), optimizers, strict=True):
        loss.sum().backward()
        optimizer.step()
    whole = {key: leaf.full_tensor() for key, leaf in spread.items()}
    close(whole, plain)
    norms = [lf.clip_grad_norm(stack, 0.1, model=base) for stack in (spread, plain)]
    close(norms[0].full_tensor(), norms[1])
    assert str(lf.summary(spread)) == str(lf.summary(plain))
    folder = tempfile.mkdtemp()
    lf.save(spread, f"{folder}/stack.safetensors")
    close(lf.load(f"{folder}/stack.safetensors"), whole, 0)
    each = {key: rows.expand(5, *rows.shape) for key, rows in data.items()}
    found = lf.vcall(base, spread, each, batched=True)
    close(found.full_tensor(), lf.vcall(base, plain, each, batched=True))


def case_torch_checkpoints_a_sweep_and_its_optimizer():
    base, data = model(), batch()
    folder = [tempfile.mkdtemp() if rank() == 0 else None]
    dist.broadcast_object_list(folder)

    def made(seed):
        stack = lf.stack([adapter(seed=seed + k) for k in range(2)])
        stack = {k: v.detach().requires_grad_("._" not in k) for k, v in stack.items()}
        return stack, torch.optim.AdamW(lf.partition(stack)[0].values(), lr=1e-2)

    def step(stack, optimizer):
        optimizer.zero_grad()
        lf.vcall(base, stack, data).sum().backward()
        optimizer.step()

    kept, other = made(0), made(7)
    for one in (kept, other):
        step(*one)
    dcp.save({"params": kept[0], "optimizer": kept[1].state_dict()}, checkpoint_id=folder[0])
    state = {"params": other[0], "optimizer": other[1].state_dict()}
    dcp.load(state, checkpoint_id=folder[0])
    other[1].load_state_dict(state["optimizer"])
    close(other[0], kept[0], 0)
    for one in (kept, other):
        step(*one)
    close(other[0], kept[0], 0)
