"""Dropout: where it acts, whose masks it draws, and that it equals PEFT's for the same mask."""

import copy
import re
import warnings

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig
from torch import nn

import lora_func as lf
from lora_func.numerics import DROPOUT, dropout
from lora_func.peft import from_peft, to_peft
from lora_func.variants import by_config
from tests.support.models import batch_for, make, scramble

CONFIGS = [
    lf.LoRA(r=2, dropout=0.4),
    lf.DoRA(r=2, dropout=0.4),
    lf.PiSSA(r=2, dropout=0.4),
    lf.DeLoRA(r=2, dropout=0.4, lambda_=1.0),
    lf.DeLoRA(r=2, dropout=0.4, lambda_=1.0, init="frozen_copy"),
    lf.VeRA(r=2, dropout=0.4),
    lf.LoRA(r=2, dropout=0.4, bias=True),
    lf.LoRAXS(r=2, dropout=0.4),
    lf.BDLoRA(r=2, dropout=0.4),
    lf.GraLoRA(r=2, hybrid_r=1, dropout=0.4),
    lf.HiRA(r=2, dropout=0.4),
    lf.MiSS(r=2, dropout=0.4),
]
NAMES = [f"{by_config(cfg).name}-{i}" for i, cfg in enumerate(CONFIGS)]
EACH = pytest.mark.parametrize("cfg", CONFIGS, ids=NAMES)


def layer():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4)).requires_grad_(False)


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def seeded(call, *args):
    torch.manual_seed(7)
    return call(*args)


class Mask(nn.Module):
    """In the place of PEFT's dropout: the mask that the seed gives here."""

    def forward(self, x):
        return seeded(dropout, x, torch.tensor(0.4)) if self.training else x


PEFT_CONFIGS = {
    "linear": peft.LoraConfig(r=2, lora_dropout=0.4, target_modules=["0"]),
    "dora": peft.LoraConfig(r=2, lora_dropout=0.4, use_dora=True, target_modules=["0"]),
    "conv": peft.LoraConfig(r=2, lora_dropout=0.4, target_modules=["1"]),
    "delora": peft.DeloraConfig(r=2, module_dropout=0.4, target_modules=["0"], delora_lambda=1),
    "bdlora": peft.LoraConfig(
        r=2,
        lora_dropout=0.4,
        use_bdlora=BdLoraConfig(target_modules_bd_a=["0"], nblocks=2),
        target_modules=["0"],
    ),
    "bias": peft.LoraConfig(r=2, lora_dropout=0.4, lora_bias=True, target_modules=["0"]),
    "gralora": peft.GraloraConfig(r=2, gralora_dropout=0.4, hybrid_r=1, target_modules=["0"]),
    "hira": peft.HiraConfig(r=2, hira_dropout=0.4, target_modules=["0"]),
    "miss": peft.MissConfig(r=2, miss_dropout=0.4, target_modules=["0"]),
    "vera": peft.VeraConfig(r=2, vera_dropout=0.4, target_modules=["0"]),
}


THEIR_NAMES = {"m": "magnitude_vector", "c": "B.bias"}


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_equals_peft_for_the_same_mask(kind, tmp_path):
    base = nn.Sequential(nn.Conv1d(6, 6, 1), nn.Conv1d(6, 4, 2)) if kind == "conv" else layer()
    wrapped = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(PEFT_CONFIGS[kind]))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    with warnings.catch_warnings():  # PEFT takes the vector lora_B.bias for a shard
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(tmp_path)
    for module in wrapped.modules():
        own = module._modules.get("default")
        if isinstance(own, nn.Dropout):
            module["default"] = Mask()
    params = from_peft(tmp_path, base)
    x = torch.randn(3, 6, 5) if kind == "conv" else X
    for mode in (True, False):
        base.train(mode), wrapped.train(mode)
        ours = seeded(lf.fcall, base, params, x)
        torch.testing.assert_close(ours, wrapped(x), atol=1e-5, rtol=1e-5)
    base.train(), wrapped.train()
    seeded(lf.fcall, base, params, x).square().sum().backward()
    wrapped(x).square().sum().backward()
    theirs = {
        re.sub(r".*(lora|hira|miss|vera)_|\.default|\.weight", "", name): p.grad
        for name, p in wrapped.named_parameters()
        if p.grad is not None
    }
    for key, leaf in lf.partition(params)[0].items():
        name = key.rpartition(".")[2]
        found = theirs[THEIR_NAMES.get(name, name)]
        torch.testing.assert_close(leaf.grad.flatten(), found.flatten(), atol=1e-4, rtol=1e-4)
    to_peft(params, tmp_path / "again", model=base)
    again = from_peft(tmp_path / "again", base)
    assert again.keys() == params.keys()
    assert all(torch.equal(again[key], leaf) for key, leaf in params.items())


def test_pissa_equals_its_residual_with_dropout_in_the_trained_product():
    model = layer().train()
    params = scramble(lf.init(model, lf.PiSSA(r=2, dropout=0.4)))
    A, B, A0, B0, scale = (params[f"0.pissa.{n}"] for n in ("A", "B", "_A0", "_B0", "_scale"))
    residual = model[0].weight - scale * B0 @ A0
    masked = seeded(dropout, X, torch.tensor(0.4))
    expected = X @ residual.T + model[0].bias + scale * masked @ A.T @ B.T
    torch.testing.assert_close(seeded(lf.fcall, model, params, X), expected)


@EACH
def test_acts_where_the_module_trains(cfg):
    model = layer()
    params = scramble(lf.init(model, cfg))
    plain = {key: leaf for key, leaf in params.items() if not key.endswith(DROPOUT)}
    assert len(plain) == len(params) - 1
    model.eval()
    assert torch.equal(lf.fcall(model, params, X), lf.fcall(model, plain, X))
    model.train()
    one, other = (lf.fcall(model, params, X) for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(seeded(lf.fcall, model, params, X), seeded(lf.fcall, model, params, X))
    model[0].eval()
    assert torch.equal(lf.fcall(model, params, X), lf.fcall(model, plain, X))
    mean = torch.stack([lf.fcall(model.train(), params, X) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, lf.fcall(model, plain, X), atol=0.15, rtol=0.05)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_adapter_of_a_sweep_has_masks_of_its_own(cfg, dtype):
    model = layer().to(dtype).train()
    params = scramble(lf.init(model, cfg))
    rate = next(key for key in params if key.endswith(DROPOUT))
    off = params | {rate: torch.zeros(())}
    stacked = lf.stack([params, params, off])
    found = lf.vcall(model, stacked, X.to(dtype))
    assert found.dtype == dtype
    assert not torch.equal(found[0], found[1])
    close = {"atol": 1e-6, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(found[2], lf.fcall(model.eval(), params, X.to(dtype)), **close)


@EACH
def test_vmap_honours_its_randomness(cfg):
    model = layer().train()
    params = scramble(lf.init(model, cfg))
    stacked = lf.stack([params, params])

    def over_adapters(randomness):
        return torch.vmap(lf.fcall, in_dims=(None, 0, None), randomness=randomness)

    with pytest.raises(RuntimeError, match="randomness"):
        over_adapters("error")(model, stacked, X)
    same = over_adapters("same")(model, stacked, X)
    torch.testing.assert_close(same[0], same[1])
    different = over_adapters("different")(model, stacked, X)
    assert not torch.equal(different[0], different[1])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("cfg", [CONFIGS[0], CONFIGS[1]], ids=["LoRA", "DoRA"])
def test_checkpointing_draws_the_same_masks(cfg):
    model = make("qwen3").requires_grad_(False).train()
    batch, params = batch_for(model), scramble(lf.init(model, cfg))

    def gradients(transform):
        torch.manual_seed(3)
        if transform:
            return torch.func.grad(lambda p: lf.fcall(model, p, batch))(params)
        trained = lf.partition(params)[0]
        loss = lf.fcall(model, params, batch)
        return dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))

    def of_a_sweep():
        torch.manual_seed(3)
        trained = lf.partition(params)[0]
        loss = lf.vcall(model, [params, params], batch, check="never").sum()
        return dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))

    for calls in (lambda: gradients(False), lambda: gradients(True), of_a_sweep):
        model.gradient_checkpointing_disable()
        expected = calls()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        found = calls()
        for key, gradient in lf.partition(expected)[0].items():
            torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=1e-4)


def test_a_weight_that_is_computed_has_no_dropout():
    model = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)
    cfg = lf.LoRA(r=2, dropout=0.1, target_modules=(), target_parameters="in_proj_weight")
    params, x = scramble(lf.init(model, cfg)), torch.randn(2, 3, 8)
    with pytest.raises(TypeError, match=r"in_proj_weight: lora has dropout, which needs the input"):
        lf.fcall(model.train(), params, (x, x, x))
    lf.fcall(model.eval(), params, (x, x, x))
    lf.merge(model.train(), params)
    model = layer().train()
    params = lf.init(model, lf.LoRA(r=2, dropout=0.1))
    with lf.attach(model, params):
        with pytest.raises(TypeError, match=r"0: lora has dropout.*leave '0\.lora\._dropout' out"):
            model(X)
        model.eval()(X)


def test_an_embedding_drops_nothing():
    model = nn.Sequential(nn.Embedding(9, 4)).requires_grad_(False).train()
    params, ids = (
        scramble(lf.init(model, lf.LoRA(r=2, dropout=0.9, target_modules="0"))),
        torch.arange(9),
    )
    assert torch.equal(lf.fcall(model, params, ids), lf.fcall(model.eval(), params, ids))


def test_sums_and_conversions_keep_it():
    model = layer()
    one, other = (scramble(lf.init(model, lf.LoRA(r=2, dropout=0.5), seed=s)) for s in range(2))
    assert lf.combine([(one, 1.0), (other, 1.0)])["0.lora._dropout"] == 0.5
    with pytest.raises(ValueError, match="0: adapters with different dropout"):
        lf.combine([(one, 1.0), (lf.init(model, lf.LoRA(r=2)), 1.0)])
    dora = scramble(lf.init(model, lf.DoRA(r=2, dropout=0.5)))
    assert lf.to_lora(dora, model, 4).params["0.lora._dropout"] == 0.5
    for wrong in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="dropout: got"):
            lf.LoRA(dropout=wrong)
