"""init: keys, seeds, dtypes, several configs, and errors."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import lora_func as lf
from tests.support.models import make


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def test_keys_dtypes_and_what_requires_grad():
    params = lf.init(mlp(), lf.LoRA(r=2), dtype=torch.bfloat16)
    assert list(params) == [
        f"{site}.lora.{leaf}" for site in (0, 2) for leaf in ("A", "B", "_scale")
    ]
    trained, constants = lf.partition(params)
    assert all(leaf.dtype == torch.bfloat16 and leaf.requires_grad for leaf in trained.values())
    assert all(leaf.is_leaf for leaf in params.values())
    # a scale stays in float32
    assert all(c.dtype == torch.float32 and not c.requires_grad for c in constants.values())
    torch.optim.AdamW(params.values())


def test_seeds():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first, again, other = (lf.init(model, lf.LoRA(r=2), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first["0.lora.A"], again["0.lora.A"])
    assert not torch.equal(first["0.lora.A"], other["0.lora.A"])
    assert not torch.equal(first["0.lora.A"], first["1.lora.A"])
    for seed in (-1, 2**64 + 5):
        lf.init(model, lf.LoRA(r=2), seed=seed)


def test_the_same_numbers_for_ever():
    """A seed always gives the same weights: hash, generator and distribution are fixed."""
    A = lf.init(nn.Sequential(nn.Linear(3, 3)), lf.LoRA(r=1), seed=7)["0.lora.A"]
    torch.testing.assert_close(A.detach(), torch.tensor([[0.4762995, 0.1214368, -0.1809874]]))


def test_defaults_of_dtype_and_device_change_nothing():
    model = mlp()
    expected = lf.init(model, lf.LoRA(r=2))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = lf.init(model, lf.LoRA(r=2))
    finally:
        torch.set_default_dtype(torch.float32)
    for key, leaf in expected.items():
        assert leaf.dtype == found[key].dtype
        assert torch.equal(leaf, found[key])


def test_dtype_changes_rounding_only():
    model = mlp()
    single, double, half = (
        lf.init(model, lf.LoRA(r=2), dtype=dtype)["0.lora.A"].detach()
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    )
    assert torch.equal(single.double(), double)
    assert torch.equal(single.bfloat16(), half)


def test_several_configs():
    model = make("bert")
    cfg = [
        lf.LoRA(
            r=2,
            target_modules="query",
            rank_pattern={r"layer\.1": 3},
            alpha_pattern={r"layer\.1": 9},
        ),
        lf.Full(target_parameters=r"^classifier\."),
    ]
    params = lf.init(model, cfg)
    query = "bert.encoder.layer.{}.attention.self.query.lora.{}".format
    assert params[query(0, "A")].shape == (2, 32)
    assert params[query(1, "A")].shape == (3, 32)
    assert params[query(0, "_scale")] == 2
    assert params[query(1, "_scale")] == 3
    assert params["classifier.full.weight"].shape == (3, 32)
    assert len(params) == 2 * 3 + 2


def test_two_configs_for_one_site_are_refused():
    model = mlp()
    for cfg in (
        [lf.LoRA(r=2), lf.LoRA(r=1, target_modules="^0$")],
        [lf.LoRA(r=2), lf.Full(target_parameters=r"^0\.weight")],
    ):
        with pytest.raises(
            ValueError, match=r"^0: its weight is named by two configs, LoRA\(.*it takes one"
        ):
            lf.init(model, cfg)


def test_patterns_that_disagree_are_refused():
    with pytest.raises(
        ValueError, match=r"^0: .*matched by patterns that disagree: \{'0': 1, '.': 2\}"
    ):
        lf.init(mlp(), lf.LoRA(rank_pattern={"0": 1, ".": 2}))
    params = lf.init(mlp(), lf.LoRA(rank_pattern={"0": 2, ".": 2}))
    assert params["0.lora.A"].shape[0] == 2


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ValueError, match="cfg: got no config"):
        lf.init(mlp(), [])
    with pytest.raises(TypeError, match=r"dtype: got torch\.int64, expected one of"):
        lf.init(mlp(), lf.LoRA(), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^0: its weight has no data yet"):
        lf.init(nn.Sequential(nn.Linear(4, 4, device="meta")), lf.LoRA(r=2))
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"^0: its weight has no data yet"):
        lf.init(lazy, lf.Full(target_parameters="weight"))
    for arguments, message in (
        (("model", lf.LoRA()), r"model: got str, expected a torch\.nn\.Module"),
        ((mlp(), lf.LoRA(), 1.0), r"seed: got 1\.0, expected an int"),
        ((mlp(), lf.LoRA(), 0, "float32"), "dtype: got float32, expected one of"),
    ):
        model, cfg, *rest = arguments
        with pytest.raises(TypeError, match=message):
            lf.init(model, cfg, **dict(zip(("seed", "dtype"), rest, strict=False)))
    packed = nn.Sequential(nn.Linear(4, 4))
    packed[0].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"^0: its weight is torch\.uint8"):
        lf.init(packed, lf.LoRA(r=2))


@dataclass(frozen=True, kw_only=True)
class Shared(lf.LinearConfig):
    """A variant like VeRA: a projection shared by all sites, and an integer constant."""


def _shared_variant():
    def init(W, cfg, generator, stats):
        return {"b": torch.zeros(W.shape[0]), "_order": torch.arange(W.shape[0]).flip(0)}

    def shared(weights, cfg, generator):
        widest = max(W.shape[1] for W in weights.values())
        return {"_A": torch.randn(1, widest, generator=generator)}

    def apply(W, params, x):
        h = x @ params["_A"][:, : x.shape[-1]].mT.to(x.dtype)
        return lf.linear(x, W) + h * params["b"][params["_order"].long()]

    return lf.Variant(
        name="shared",
        config=Shared,
        init=init,
        apply=apply,
        shared=shared,
        leaves={"b": "d_out", "_order": "d_out", "_A": "1 widest"},
    )


def test_shared_and_integer_constants():
    lf.register(_shared_variant())
    model, x = mlp(), torch.randn(3, 4)
    params = lf.init(model, Shared())
    assert next(iter(params)) == "*.shared._A"
    assert params["*.shared._A"].shape == (1, 6)
    assert not params["*.shared._A"].requires_grad
    assert params["0.shared._order"].dtype == torch.float64
    assert torch.equal(lf.fcall(model, params, x), model(x))
    params = {k: v.detach() + (k.endswith(".b")) for k, v in params.items()}
    gradients = torch.func.grad(lambda p: lf.fcall(model, p, x).sum())(params)
    assert gradients["0.shared.b"].any()
    assert not gradients["*.shared._A"].any()
    losses = torch.vmap(lf.fcall, (None, 0, None))(model, lf.stack([params, params]), x)
    torch.testing.assert_close(losses[1], lf.fcall(model, params, x))
    with pytest.raises(ValueError, match=r"two shared configs would share this constant"):
        lf.init(model, [Shared(target_modules="0"), Shared(target_modules="2")])


def test_register_refuses_what_would_clash():
    variant = _shared_variant()._replace(name="one", config=type("One", (lf.LinearConfig,), {}))
    lf.register(variant)
    lf.register(variant)
    again = variant._replace(config=lf.LinearConfig)
    with pytest.raises(ValueError, match=r"'one': the name is taken.*pass overwrite=True"):
        lf.register(again)
    with pytest.raises(ValueError, match="'two': config One belongs to 'one'"):
        lf.register(variant._replace(name="two"))
    lf.register(again, overwrite=True)
    lf.register(variant, overwrite=True)
    with pytest.raises(ValueError, match="three: leaves is empty"):
        lf.register(variant._replace(name="three", leaves={}))
    for leaves, message in (
        ({"b": "d_out r+1"}, r"axis 'r\+1': expected a name"),
        ({"b": "r d_in | d_in r"}, "'b' have the rank at different places"),
    ):
        with pytest.raises(ValueError, match=message):
            lf.register(variant._replace(name="three", leaves=leaves))
    with pytest.raises(ValueError, match=r"'a\.b' cannot be part of a key"):
        lf.register(variant._replace(name="a.b"))


@pytest.mark.gpu
def test_the_same_numbers_on_a_gpu():
    model = mlp()
    here = lf.init(model, lf.LoRA(r=2))
    there = lf.init(model.cuda(), lf.LoRA(r=2))
    assert all(leaf.is_cuda and torch.equal(leaf.cpu(), here[key]) for key, leaf in there.items())
