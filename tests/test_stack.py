"""Stacks: padding is exact and differentiable, and unstack reverses it."""

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora_func as lf
from lora_func.testing import seeds
from lora_func.variant import rank_of


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def made(model, r, seed=0, **settings):
    params = lf.init(model, lf.LoRA(r=r, **settings), seed=seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for leaf in lf.partition(params)[0].values():
        leaf.data.normal_(generator=generator)
    return params


@given(ranks=st.lists(st.integers(1, 3), min_size=1, max_size=5), seed=seeds)
def test_mixed_ranks_are_exact(ranks, seed):
    model, x = mlp(), torch.randn(5, 4, dtype=torch.float64)
    adapters = [made(model, r, seed + i, alpha=i + 1.0) for i, r in enumerate(ranks)]
    stacked = lf.stack(adapters)
    outputs = torch.vmap(lf.fcall, (None, 0, None))(model, stacked, x)
    loop = torch.stack([lf.fcall(model, one, x) for one in adapters])
    torch.testing.assert_close(outputs, loop, rtol=1e-12, atol=1e-12)
    leaves = [leaf for one in adapters for leaf in lf.partition(one)[0].values()]
    ours = torch.autograd.grad(outputs.square().sum(), leaves)
    for gradient, solo in zip(ours, torch.autograd.grad(loop.square().sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, solo, rtol=1e-12, atol=1e-12)

    again = lf.unstack(stacked)
    for one, other in zip(adapters, again, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        safetensors.torch.save(other)
    assert any("_rank" in key for key in stacked) == (len(set(ranks)) > 1)


def test_padding_stays_zero_when_the_stack_itself_is_trained():
    model, x = mlp(), torch.randn(5, 4, dtype=torch.float64)
    stacked = {
        key: leaf.detach() for key, leaf in lf.stack([made(model, 1), made(model, 3)]).items()
    }
    trained, constants = lf.partition(stacked)
    for leaf in trained.values():
        leaf.requires_grad_()
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        outputs = torch.vmap(lf.fcall, (None, 0, None))(model, trained | constants, x)
        outputs.square().sum().backward()
        optimizer.step()
    assert not stacked["0.lora.A"][0, 1:].any()
    assert not stacked["0.lora.B"][0, :, 1:].any()
    assert stacked["0.lora.A"][0, 0].any()
    small, large = lf.unstack(stacked)
    assert small["0.lora.A"].shape == (1, 4)
    assert large["0.lora.A"].shape == (3, 4)


def test_order_of_keys_and_what_requires_grad():
    stacked = lf.stack([made(mlp(), 1), made(mlp(), 2)])
    keys = [key for key in stacked if not key.endswith("_rank")]
    assert keys == list(made(mlp(), 1))
    assert stacked["0.lora.A"].requires_grad
    assert not stacked["0.lora._scale"].requires_grad
    assert stacked["0.lora._rank"].tolist() == [1.0, 2.0]
    assert "0.lora._rank" in lf.partition(stacked)[1]


def test_one_table_of_ranks_for_each_site():
    model = mlp()
    stacked = lf.stack([made(model, 1), made(model, 1, rank_pattern={"^2": 3})])
    assert "0.lora._rank" not in stacked
    assert stacked["2.lora._rank"].tolist() == [1, 3]


def test_the_rank_axes_of_one_leaf_agree():
    square = lf.Variant("square", lf.LoRA, init=None, apply=None, leaves={"R": "r r"})
    assert rank_of(square, {"R": torch.zeros(3, 3)}) == 3
    with pytest.raises(ValueError, match="square: leaves of one site have different ranks"):
        rank_of(square, {"R": torch.zeros(2, 3)})


def test_what_cannot_be_stacked_is_refused():
    model = mlp()
    one, other = made(model, 1), made(model, 2)
    head = lf.init(model, lf.Full(target_parameters="2"), dtype=torch.float64)
    with pytest.raises(ValueError, match="adapters: got none"):
        lf.stack([])
    with pytest.raises(ValueError, match=r"adapters 0 and 1 differ in their keys, \['0\.lora"):
        lf.stack([one, head])
    with pytest.raises(ValueError, match=r"0\.lora\.A: cannot stack leaves that differ.*float32"):
        lf.stack([one, one | {"0.lora.A": one["0.lora.A"].float()}])
    with pytest.raises(ValueError, match=r"2\.full\.bias: cannot stack leaves that differ"):
        lf.stack([head, head | {"2.full.bias": torch.zeros(7, dtype=torch.float64)}])
    with pytest.raises(ValueError, match=r"stacks of mixed rank.*unstack them first"):
        lf.stack([lf.stack([one, other])] * 2)
    with pytest.raises(ValueError, match="lora: leaves of one site have different ranks"):
        lf.stack([one | {"0.lora.A": other["0.lora.A"]}])
    with pytest.raises(ValueError, match=r"0\.lora\.A: got shape .* is that of one.*stack\("):
        lf.unstack(one)
    gains = lf.init(nn.Sequential(nn.Linear(4, 4)), lf.IA3())
    with pytest.raises(ValueError, match=r"0\.ia3\.g: got shape \(4,\), which is that of one"):
        lf.unstack(gains)
    with pytest.raises(ValueError, match=r"leaves have the first axes \{\}, expected one"):
        lf.unstack({})
    twice = lf.stack([one, one])
    with pytest.raises(ValueError, match=r"first axes \{2: '0\.lora\.A', 3: '2\.lora\.A'\}"):
        lf.unstack({**twice, "2.lora.A": torch.zeros(3, 2, 4)})
