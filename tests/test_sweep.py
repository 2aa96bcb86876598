"""vcall: a sweep of K adapters equals K solo runs; unsupported models raise an error."""

import copy
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

import lora_func as lf
from lora_func.runtime import layout_of
from tests.support.families import of_class, text
from tests.support.models import Gate, batch_for, make, scramble
from tests.support.pairs import ADAPTERS, adapter, families
from tests.support.snapshots import assert_same, snapshot

OVER_ADAPTERS = (None, 0, None)
EACH_MODEL = pytest.mark.parametrize("family", ["qwen3", "gpt2", "bert"])


def same(ours, theirs, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def frozen(family, **settings):
    return make(family, **settings).requires_grad_(False)


def lora(model, seed=0, **settings):
    return scramble(lf.init(model, lf.LoRA(**{"r": 2} | settings), seed=seed), seed)


def optimizer_of(adapters, settings):
    return torch.optim.AdamW(
        {"params": [*lf.partition(one)[0].values()], **own}
        for one, own in zip(adapters, settings, strict=True)
    )


def trained(adapters, settings, losses_of, steps=20, after_backward=lambda step: None):
    """Train the adapters in place and return the losses of each step."""
    optimizer, curve = optimizer_of(adapters, settings), []
    for step in range(steps):
        optimizer.zero_grad()
        losses = losses_of(adapters)
        losses.sum().backward()
        after_backward(step)
        optimizer.step()
        curve.append(losses.detach())
    return torch.stack(curve)


SETTINGS = [
    {"lr": 1e-3, "weight_decay": 0.0},
    {"lr": 3e-3, "weight_decay": 0.1},
    {"lr": 1e-4, "weight_decay": 0.01},
]


def assert_sweep_equals_solo_runs(model, make_adapters, settings=SETTINGS):
    batch = batch_for(model)
    together, alone = make_adapters(), make_adapters()
    settings = settings[: len(together)]
    losses = trained(together, settings, lambda all_: lf.vcall(model, lf.stack(all_), batch))
    for k, one in enumerate(alone):
        solo = trained([one], settings[k : k + 1], lambda all_: lf.fcall(model, all_[0], batch))
        same(losses[:, k], solo)
        same(together[k], one)


@pytest.mark.parametrize(
    ("case", "family"),
    [(case, family) for case in ADAPTERS for family in families(case)],
    ids=str,
)
def test_a_sweep_of_seeds_equals_solo_runs(case, family):
    """float64, because the key bias has zero gradient and Adam would amplify rounding errors."""
    model = frozen(family, dtype=torch.float64)
    assert_sweep_equals_solo_runs(model, lambda: [adapter(case, model, seed) for seed in range(2)])


@EACH_MODEL
@pytest.mark.parametrize(
    "config", [lf.LoRA, lf.DoRA, lf.PiSSA, lf.HRA, lf.VeRA], ids=lambda config: config.__name__
)
def test_a_sweep_of_ranks_and_alphas_equals_solo_runs(family, config):
    model = frozen(family)

    def adapters():
        with_alpha = {} if config in (lf.HRA, lf.VeRA) else {"alpha": 3.0}
        return [lf.init(model, config(r=r, **with_alpha), seed=r) for r in (2, 6, 4)]

    assert_sweep_equals_solo_runs(model, adapters)


def test_a_sweep_of_heads_equals_solo_runs():
    model = frozen("bert")
    cfg = [lf.LoRA(r=2), lf.Full(target_parameters="LayerNorm|classifier|word_embeddings")]
    assert_sweep_equals_solo_runs(
        model, lambda: [scramble(lf.init(model, cfg, seed=seed), seed) for seed in range(3)]
    )


@EACH_MODEL
def test_stacks_of_different_variants_in_one_step(family):
    model, batch = frozen(family), batch_for(frozen(family))
    head = lf.Full(target_parameters="norm|ln_|LayerNorm|classifier")
    configs = [lf.LoRA(r=2), lf.DoRA(r=3), [lf.IA3(target_modules="attn|attention"), head], head]
    stacks = [
        [scramble(lf.init(model, cfg, seed=seed), seed) for seed in range(n)]
        for cfg, n in zip(configs, (3, 1, 2, 1), strict=True)
    ]
    adapters = [one for of_one_kind in stacks for one in of_one_kind]
    stacked = [lf.stack(of_one_kind) for of_one_kind in stacks]
    loop = torch.stack([lf.fcall(model, one, batch) for one in adapters])
    leaves = [leaf for one in adapters for leaf in lf.partition(one)[0].values()]
    expected = torch.autograd.grad(loop.sum(), leaves)
    for chunk in (None, 1, 2, 5):
        losses = lf.vcall(model, stacked, batch, chunk=chunk)
        same(losses, loop)
        same(torch.autograd.grad(losses.sum(), leaves, retain_graph=True), expected)


def test_an_adapter_that_breaks_concerns_itself_alone():
    model = frozen("qwen3")
    batch = batch_for(model)

    def run(breaks):
        adapters = [lf.init(model, lf.LoRA(r=2), seed=seed) for seed in range(4)]

        def after_backward(step):
            norms = lf.clip_grad_norm(adapters, 0.1)
            assert norms.shape == (4,)
            if breaks and step == 5:
                with torch.no_grad():
                    for leaf in lf.partition(adapters[2])[0].values():
                        leaf.fill_(float("nan"))

        losses = trained(
            adapters,
            [{"lr": 1e-2}] * 4,
            lambda all_: lf.vcall(model, lf.stack(all_), batch),
            steps=9,
            after_backward=after_backward,
        )
        return losses, adapters

    (losses, adapters), (expected, others) = run(True), run(False)
    assert losses[6:, 2].isnan().all()
    for k in (0, 1, 3):
        assert torch.equal(losses[:, k], expected[:, k])
        assert all(torch.equal(adapters[k][key], leaf) for key, leaf in others[k].items())


def test_members_come_and_go():
    model, batch = frozen("bert"), batch_for(frozen("bert"))
    adapters = {seed: lora(model, seed) for seed in range(4)}
    del adapters[1]
    adapters["clone"] = {k: v.detach().clone().requires_grad_() for k, v in adapters[0].items()}
    adapters["new"] = lora(model, seed=9)
    losses = lf.vcall(model, lf.stack(adapters.values()), batch)
    same(losses, torch.stack([lf.fcall(model, one, batch) for one in adapters.values()]))
    assert torch.equal(losses[0], losses[3])


@EACH_MODEL
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_checkpointing_and_half_precision(family, attention, checkpointing, dtype):
    model = frozen(family, dtype=dtype, attn_implementation=attention).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_dropout = 0.0
    batch, adapters = batch_for(model), [lora(model, seed) for seed in range(3)]
    leaves = [leaf for one in adapters for leaf in lf.partition(one)[0].values()]
    loop = torch.stack([lf.fcall(model, one, batch) for one in adapters])
    expected = torch.autograd.grad(loop.sum(), leaves)
    if checkpointing:
        model.activation_checkpointing_enable()
    before = snapshot(model)
    losses = lf.vcall(model, lf.stack(adapters), batch)
    assert_same(before, model)
    half = dtype == torch.bfloat16
    same(losses, loop, *((0.03, 0.03) if half else (1e-5, 1e-5)))
    for ours, theirs in zip(torch.autograd.grad(losses.sum(), leaves), expected, strict=True):
        off = (ours - theirs).norm() / theirs.norm()
        assert off < (0.1 if half else 1e-4)


def test_autocast():
    model, batch = frozen("bert"), batch_for(frozen("bert"))
    adapters = [lora(model, seed) for seed in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        losses = lf.vcall(model, lf.stack(adapters), batch)
        loop = torch.stack([lf.fcall(model, one, batch) for one in adapters])
    same(losses, loop, 0.02, 0.02)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_each_adapter_draws_its_own_dropout(checkpointing):
    model = frozen("bert").train()
    if checkpointing:
        model.activation_checkpointing_enable()
    batch, one = batch_for(model), lora(model)
    losses = lf.vcall(model, lf.stack([one, one, one]), batch)
    assert len({*losses.tolist()}) == 3
    losses.sum().backward()
    model.eval()
    losses = lf.vcall(model, lf.stack([one, one, one]), batch)
    assert len({*losses.tolist()}) == 1


LOSSES = {
    "regression": {"num_labels": 1, "problem_type": "regression"},
    "two numbers": {"num_labels": 2, "problem_type": "regression"},
    "many labels": {"num_labels": 3, "problem_type": "multi_label_classification"},
    "one label": {"num_labels": 3, "problem_type": "single_label_classification"},
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_losses_of_classifiers(kind, rows):
    settings = LOSSES[kind]
    torch.manual_seed(0)
    model = frozen("bert")
    model.num_labels = model.config.num_labels = settings["num_labels"]
    model.config.problem_type = settings["problem_type"]
    model.classifier = nn.Linear(32, settings["num_labels"]).requires_grad_(False)
    batch = {key: tensor[:rows] for key, tensor in of_class().items()}
    if kind != "one label":
        shape = (rows,) if kind == "regression" else (rows, settings["num_labels"])
        batch["labels"] = torch.rand(shape)
    adapters = [lora(model, seed) for seed in range(3)]
    losses = lf.vcall(model, lf.stack(adapters), batch)
    same(losses, torch.stack([lf.fcall(model, one, batch) for one in adapters]))


def test_an_explicit_count_of_tokens():
    model = frozen("qwen3")
    batch = batch_for(model) | {"num_items_in_batch": torch.tensor(17)}
    adapters = [lora(model, seed) for seed in range(3)]
    losses = lf.vcall(model, lf.stack(adapters), batch)
    same(losses, torch.stack([lf.fcall(model, one, batch) for one in adapters]))


def test_outputs_and_loss_fn():
    model, batch = frozen("qwen3"), text()
    adapters = [lora(model, seed) for seed in range(3)]
    stacked, inputs = lf.stack(adapters), {k: v for k, v in batch.items() if k != "labels"}
    outputs = lf.vcall(model, stacked, inputs, chunk=2)
    expected = torch.stack([lf.fcall(model, one, inputs).logits for one in adapters])
    same(outputs.logits, expected)
    seen = []

    def loss_fn(output, given):
        seen.append((output.logits.shape, output.loss.shape, given is batch))
        return {"mean": output.logits.mean(), "loss": 2 * output.loss}

    results = lf.vcall(model, stacked, batch, loss_fn=loss_fn)
    assert seen == [((3, 10, 64), (), True)] * 3
    same(results["mean"], expected.mean((1, 2, 3)))
    same(results["loss"], 2 * lf.vcall(model, stacked, batch))


def test_an_own_batch_for_each():
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    adapters, x = [lora(model, seed) for seed in range(3)], torch.randn(3, 5, 4)
    given = []

    def loss_fn(y, batch):
        given.append(batch)
        return (y - batch).square().mean()

    losses = lf.vcall(model, lf.stack(adapters), x, loss_fn=loss_fn, batched=True, chunk=2)
    assert all(torch.equal(a, b) for a, b in zip(given, x, strict=True))
    loop = [lf.fcall(model, *pair, loss_fn=loss_fn) for pair in zip(adapters, x, strict=True)]
    same(losses, torch.stack(loop))


def test_kinds_of_batches_and_outputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, scale=1.0, shift=None, flag=True):
            y = self.layer(x) * scale
            y = y if shift is None else y + shift
            return {"y": [y, y.sum(-1)], "flag": flag}

    model, x = Model().requires_grad_(False), torch.randn(3, 4)
    adapters = [lora(model, seed) for seed in range(2)]
    stacked = lf.stack(adapters)
    for batch in (
        x,
        (x, 2.0),
        [x, torch.tensor(2.0)],
        {"x": x, "shift": torch.randn(1, 4), "flag": None},
        {"x": x.mT.contiguous().mT, "shift": torch.randn(3, 1)},
        {"x": x[:0]},
        {"x": x[:1]},
    ):
        ours = lf.vcall(model, stacked, batch)
        loop = [lf.fcall(model, one, batch) for one in adapters]
        for i in range(2):
            same(ours["y"][i], torch.stack([one["y"][i] for one in loop]))
    one = lf.vcall(model, lf.stack(adapters[:1]), x)
    same(one["y"][0][0], lf.fcall(model, adapters[0], x)["y"][0])


@EACH_MODEL
def test_torch_func_goes_through(family):
    model, batch = frozen(family), batch_for(frozen(family))
    adapters = [lora(model, seed) for seed in range(2)]
    stacked = {key: leaf.detach() for key, leaf in lf.stack(adapters).items()}
    trained, constants = lf.partition(stacked)

    def with_vcall(leaves):
        return lf.vcall(model, {**leaves, **constants}, batch).sum()

    def with_vmap(leaves):
        return torch.vmap(lf.fcall, OVER_ADAPTERS)(model, {**leaves, **constants}, batch).sum()

    same(torch.func.grad(with_vcall)(trained), torch.func.grad(with_vmap)(trained))
    tangent = {key: torch.randn_like(leaf) for key, leaf in trained.items()}
    for derivative in (
        lambda f: torch.func.jvp(f, (trained,), (tangent,)),
        lambda f: torch.func.jvp(torch.func.grad(f), (trained,), (tangent,)),
    ):
        same(derivative(with_vcall), derivative(with_vmap), 1e-3, 1e-4)


def test_inside_vmap():
    model, x = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False), torch.randn(3, 5, 4)
    stacked = lf.stack([lora(model, seed) for seed in range(2)])

    def over_batches(**settings):
        return torch.vmap(lambda batch: lf.vcall(model, stacked, batch, **settings))(x)

    with pytest.raises(RuntimeError, match=r"cannot be checked inside torch\.vmap"):
        over_batches()
    expected = torch.stack([lf.vcall(model, stacked, batch) for batch in x])
    same(over_batches(), expected)
    same(over_batches(check="never"), expected)


def test_hooks_of_the_user_fire_once():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4)
    stacked = lf.stack([lora(model.requires_grad_(False), seed) for seed in range(2)])
    lf.vcall(model, stacked, x)
    calls = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, a, y, name=name: calls.append((name, len(y))))
    lf.vcall(model, stacked, x)
    assert calls == [("0", 6), ("1", 6), ("2", 6), ("", 6)]


class Mixes(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.first, self.second, self.mix = nn.Linear(4, 4), nn.Linear(4, 4), mix

    def forward(self, x):
        return self.second(self.mix(self.first(x)))


MIXERS = {
    "the mean over rows": lambda x: x - x.mean(0),
    "a sort": lambda x: x.sort(0).values,
    "interleaved rows": lambda x: x.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1),
}


@pytest.mark.parametrize("mix", MIXERS.values(), ids=MIXERS)
def test_a_model_that_mixes_rows_is_found_out(mix):
    """Freshly initialized adapters also detect it, although their outputs are equal."""
    model, x = Mixes(mix).requires_grad_(False), torch.randn(4, 4)
    adapters = [lf.init(model, lf.LoRA(r=2), seed=seed) for seed in range(2)]
    stacked = lf.stack(adapters)
    before = snapshot(model)
    for _ in range(2):
        with pytest.raises(lf.FoldError, match="another output in a batch with others than alone"):
            lf.vcall(model, stacked, x)
    loop = torch.stack([lf.fcall(model, one, x) for one in adapters])
    assert torch.equal(lf.vcall(model, stacked, x, fallback="loop"), loop)
    assert_same(before, model)


def test_another_kind_of_batch_is_checked_anew():
    class Model(Own):
        def forward(self, x, labels=None, mix=False):
            y = self.layer(x)
            loss = None if labels is None else (y - labels).var(0).mean() * torch.ones(3)
            return ModelOutput(logits=y - y.mean(0) if mix else y, loss=loss)

    model = Model(None).requires_grad_(False)
    stacked = lf.stack([lora(model, seed) for seed in range(3)])
    lf.vcall(model, stacked, {"x": X})
    for more in ({"mix": True}, {"labels": X}):
        with pytest.raises(lf.FoldError, match="another output in a batch with others"):
            lf.vcall(model, stacked, {"x": X, **more})
    lf.vcall(model, stacked, {"x": X})


UNTOLD = {
    "a count": lambda y: {"y": y, "n": len(y)},
    "a distribution": lambda y: {"y": y, "d": torch.distributions.Categorical(logits=y)},
    "integers": lambda y: {"y": y, "p": torch.arange(6)},
    "a table": lambda y: {"y": y, "p": torch.arange(4.0)},
    "mixed integers": lambda y: (y.sum() * 1000).long().expand(len(y)),
    "mixed complex numbers": lambda y: torch.fft.fft(y, dim=0),
    "a list of rows": lambda y: [*y],
}


@pytest.mark.parametrize("output", UNTOLD.values(), ids=UNTOLD)
def test_outputs_that_cannot_be_told_apart(output):
    model = Own(lambda model, x: output(model.layer(x))).requires_grad_(False)
    stacked = lf.stack([lora(model, seed) for seed in range(2)])
    with pytest.raises(lf.FoldError):
        lf.vcall(model, stacked, X)


def test_what_an_output_may_hold_beside_rows():
    def output(model, x):
        y = model.layer(x)
        masked = y.masked_fill(torch.arange(4) == 0, -torch.inf)
        return {"y": masked, "loss": nn.functional.mse_loss(y, x), "name": "one", "none": None}

    model = Own(output).requires_grad_(False)
    adapters = [lora(model, seed) for seed in range(3)]
    for rows in (3, 1):
        for chunk in (None, 2):
            ours = lf.vcall(model, lf.stack(adapters), X[:rows], chunk=chunk)
            loop = [lf.fcall(model, one, X[:rows]) for one in adapters]
            same(ours["y"], torch.stack([one["y"] for one in loop]))
            same(ours["loss"], torch.stack([one["loss"] for one in loop]))
            assert ours["name"] == "one"


@EACH_MODEL
def test_one_row_and_one_adapter(family):
    model = frozen(family)
    batch = {key: tensor[:1] for key, tensor in batch_for(model).items()}
    adapters = [lora(model, seed) for seed in range(2)]
    loop = torch.stack([lf.fcall(model, one, batch) for one in adapters])
    same(lf.vcall(model, lf.stack(adapters), batch), loop)
    same(lf.vcall(model, lf.stack(adapters[:1]), batch), loop[:1])
    wpe = [lora(frozen("gpt2"), target_modules="wpe")]
    if family == "gpt2":  # a stack of one adapter works on any site
        same(lf.vcall(model, lf.stack(wpe), batch), lf.fcall(model, wpe[0], batch)[None])


def test_the_check_leaves_a_running_model_alone():
    gate, seen = Gate(), []
    model = nn.Sequential(
        nn.Linear(4, 4), gate, Own(lambda model, x: (seen.append(model.training), x)[1])
    )
    model.requires_grad_(False).train()
    adapters = [lora(model, seed, target_modules="0") for seed in range(2)]
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(lf.fcall, model, adapters[0], X)
        assert gate.inside.wait(60)
        with pytest.raises(lf.BusyModelError):
            lf.vcall(model, lf.stack(adapters), X)
        assert model.training
        gate.go.set()
        job.result(60)
    assert seen == [True]


def test_a_model_may_write_into_its_batch():
    model = Own(lambda model, x: model.layer(x.mul_(2))).requires_grad_(False)
    adapters = [lora(model, seed) for seed in range(2)]
    x = X.clone()
    ours = lf.vcall(model, lf.stack(adapters), x)
    assert torch.equal(x, X)
    same(ours, torch.stack([lf.fcall(model, one, X.clone()) for one in adapters]))


class Counts(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


def test_the_first_call_is_checked_and_no_other():
    model, x = Counts().requires_grad_(False), torch.randn(3, 4)
    stacked = lf.stack([lora(model, seed) for seed in range(5)])
    random_state = torch.get_rng_state()
    for calls in (4, 1, 1):  # first call: joint, first, last, joint; then joint only
        model.calls = 0
        lf.vcall(model, stacked, x)
        assert model.calls == calls
    model.layer = nn.Linear(4, 4).requires_grad_(False)
    model.calls = 0
    lf.vcall(model, stacked, x, check="never")
    assert model.calls == 1
    lf.vcall(model, stacked, x)
    assert model.calls == 5
    torch.set_rng_state(random_state)


def test_the_check_does_not_mind_broken_leaves():
    model, x = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False), torch.randn(3, 4)
    stacked = lf.stack([lora(model, seed) for seed in range(3)])
    stacked["0.lora.A"][1] = torch.inf
    y = lf.vcall(model, {key: leaf.detach() for key, leaf in stacked.items()}, x)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


class Own(nn.Module):
    """A model that applies a given function to its layer and input."""

    def __init__(self, then, layer=None):
        super().__init__()
        self.layer, self.then = layer or nn.Linear(4, 4), then

    def forward(self, x):
        return self.then(self, x)


TIED = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
TIED["b"].weight = TIED["a"].weight


def opaque(model, x):
    return SimpleNamespace(y=model.layer(x))


def one_loss(model, x):
    return SimpleNamespace(loss=model.layer(x).square().mean())


def auxiliary(model, x):
    y = model.layer(x)
    return ModelOutput(logits=y, aux_loss=y.mean(0))


X = torch.randn(3, 4)
REFUSED = {
    "batch norm": (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train(),
        X,
        r"BatchNorm1d: its statistics are over the rows of all adapters; call eval",
    ),
    "batch norm without statistics": (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval(),
        X,
        "its statistics are over the rows",
    ),
    "one number": (
        Own(one_loss),
        X,
        r"a tensor of shape \(\) over the rows of 2 adapters.*pass loss_fn",
    ),
    "auxiliary loss": (Own(auxiliary), X, r"an auxiliary loss.*output_router_logits=False"),
    "opaque output": (Own(opaque), X, "gives a SimpleNamespace.*register_pytree_node"),
    "no rows in the output": (
        Own(lambda model, x: model.layer(x).mean()),
        X,
        r"a tensor of shape \(\) over the rows of 2 adapters",
    ),
    "a table": (
        Own(lambda model, x: x + model.layer(torch.eye(4)).mean()),
        X,
        r"layer: its inputs have shapes \[\(4, 4\)\].*a multiple of 6 rows",
    ),
    "rows on another axis": (
        Own(lambda model, x: model.layer(x.transpose(0, 1)).transpose(0, 1)),
        torch.randn(3, 5, 4),
        r"layer: its inputs have shapes \[\(5, 6, 4\)\]",
    ),
    "rows of different number": (
        Own(lambda model, x: x),
        (X, torch.randn(2, 4)),
        r"batch: tensors of shapes \[\(3, 4\), \(2, 4\)\].*the same number of rows",
    ),
    "no tensor": (Own(lambda model, x: x), (None,), r"batch: tensors of shapes \[\]"),
}


@pytest.mark.parametrize(("model", "batch", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(model, batch, message):
    model.requires_grad_(False)
    stacked = lf.stack([lora(model, seed, target_modules="layer|0") for seed in range(2)])
    before = snapshot(model)
    with pytest.raises(lf.FoldError, match=message):
        lf.vcall(model, stacked, batch)
    with pytest.raises(lf.FoldError, match=message):
        lf.vcall(model, stacked, batch, check="never")
    assert_same(before, model)


def test_tied_parameters_are_refused_and_looped():
    model = copy.deepcopy(TIED).requires_grad_(False)
    model.forward = lambda x: model["b"](model["a"](x))
    adapters = [scramble(lf.init(model, lf.Full(target_parameters="weight")), s) for s in range(2)]
    with pytest.raises(lf.FoldError, match=r"a: other modules read this parameter as well"):
        lf.vcall(model, lf.stack(adapters), X)
    ours = lf.vcall(model, lf.stack(adapters), X, fallback="loop")
    same(ours, torch.stack([lf.fcall(model, one, X) for one in adapters]))


def test_wrong_arguments():
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    one = lora(model)
    with pytest.raises(ValueError, match=r"0\.lora\.A: got shape \(2, 4\).* vcall\(model, stack\("):
        lf.vcall(model, one, X)
    for none in ([], [{}], {}):
        with pytest.raises(ValueError, match="adapters: got no adapter"):
            lf.vcall(model, none, X)
    for wrong in ([one["0.lora.A"]], one["0.lora.A"], "abc"):
        with pytest.raises(TypeError, match=r"adapters: got a .*, expected an adapter or a stack"):
            lf.vcall(model, wrong, X)
    with pytest.raises(ValueError, match=r"0\.lora\._scale: this leaf is missing; .*\*\*trained"):
        lf.vcall(model, lf.partition(lf.stack([one, one]))[0], X)
    stacked = lf.stack([one, one])
    for name in ("chunk", "check", "fallback"):
        with pytest.raises(ValueError, match=f"{name}: got 0"):
            lf.vcall(model, stacked, X, **{name: 0})
    with pytest.raises(ValueError, match=r"with batched=True each has the axes \(adapters, rows"):
        lf.vcall(model, stacked, X, batched=True)
    stacked["0.lora.C"] = torch.zeros(2, 1)
    with pytest.raises(lf.UnusedLeafError, match=r"0\.lora\.C"):
        lf.vcall(model, stacked, X)


@pytest.mark.parametrize("as_stack", [False, True])
def test_gradients_are_clipped_for_each_adapter(as_stack):
    leaves = {"a.delora.lambda": torch.zeros(()), "a.delora.B": torch.zeros(7, 1)}
    adapters = [{key: leaf.clone() for key, leaf in leaves.items()} for _ in range(3)]
    for k, one in enumerate(adapters):
        for leaf in one.values():
            leaf.grad = torch.full_like(leaf, 10.0**k)
    expected = [{key: leaf.grad.clone() for key, leaf in one.items()} for one in adapters]
    if as_stack:
        stacked = {key: torch.stack([one[key] for one in adapters]) for key in adapters[0]}
        for key, leaf in stacked.items():
            leaf.grad = torch.stack([one[key].grad for one in adapters])
        norms = lf.clip_grad_norm(stacked, max_norm=20.0)
        clipped = [{key: leaf.grad[k] for key, leaf in stacked.items()} for k in range(3)]
    else:
        norms = lf.clip_grad_norm(adapters, max_norm=20.0)
        clipped = [{key: leaf.grad for key, leaf in one.items()} for one in adapters]
    norm = 8**0.5
    same(norms, torch.tensor([norm, 10 * norm, 100 * norm]))
    assert all(torch.equal(clipped[0][key], expected[0][key]) for key in expected[0])
    for k in (1, 2):
        size = torch.cat([g.flatten() for g in clipped[k].values()]).norm()
        same(size, torch.tensor(20.0))
    with pytest.raises(ValueError, match="max_norm: got -1"):
        lf.clip_grad_norm(adapters, -1)


def with_gradients(model, cfg, count=None):
    each = [lf.init(model, cfg, seed=seed) for seed in range(count or 1)]
    params = lf.stack(each) if count else each[0]
    leaves = {key: leaf.detach().requires_grad_(leaf.requires_grad) for key, leaf in params.items()}
    for leaf in lf.partition(leaves)[0].values():
        leaf.grad = torch.ones_like(leaf)
    return leaves


def norm_of(params):
    return torch.cat([leaf.grad.flatten() for leaf in lf.partition(params)[0].values()]).norm()


def test_what_is_clipped_together():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    head = lf.Full(target_parameters="1.weight")
    for cfg in (lf.IA3(), lf.LoRA(r=2), [lf.LoRA(r=2, target_modules="0"), head]):
        one, other = with_gradients(model, cfg), with_gradients(model, cfg)
        norms = lf.clip_grad_norm(one, 1.0)
        same(norms, norm_of(other)[None])
        same(norm_of(one), torch.tensor(1.0))
        stacks = [with_gradients(model, cfg, 2), with_gradients(model, cfg, 3)]
        norms = lf.clip_grad_norm([*stacks, other], 1.0)
        same(norms, norm_of(with_gradients(model, cfg)).expand(6))
        same(norm_of(stacks[1]), torch.tensor(3.0).sqrt())
        same(norm_of(other), torch.tensor(1.0))


def test_what_is_not_clipped():
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    cfg = lf.Full(target_parameters="weight")
    one, stacked = with_gradients(model, cfg), with_gradients(model, cfg, 2)
    with pytest.raises(ValueError, match=r"0\.full\.weight: only the model tells .* pass model="):
        lf.clip_grad_norm(one, 1.0)
    assert lf.clip_grad_norm(one, 1.0, model=model).shape == (1,)
    assert lf.clip_grad_norm([stacked, one], 1.0, model=model).shape == (3,)
    with pytest.raises(ValueError, match=r"no leaf has a gradient; call backward"):
        lf.clip_grad_norm(lora(model), 1.0)
    with pytest.raises(TypeError, match=r"adapters: got a dict_values|got a Tensor"):
        lf.clip_grad_norm(one.values(), 1.0)
    with pytest.raises(ValueError, match=r"first axes"):
        lf.clip_grad_norm(one | with_gradients(model, lf.LoRA(r=2), 3), 1.0)


def test_a_list_of_adapters_and_stacks():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).requires_grad_(False)
    a, b = lora(model, 0), lora(model, 1)
    gain, wide = scramble(lf.init(model, lf.IA3())), scramble(lf.init(model, lf.LoRA(r=3)))
    found = lf.vcall(model, [a, wide, lf.stack([b, a]), gain, b], X)
    same(found, torch.stack([lf.fcall(model, one, X) for one in (a, wide, b, a, gain, b)]))
    leaf = b["0.lora.B"]
    (gradient,) = torch.autograd.grad(found[2].sum(), leaf, retain_graph=True)
    assert gradient.any()
    other = nn.Linear(4, 4, bias=False)
    head = lf.init(other, lf.Full(target_parameters="weight"))
    same(lf.vcall(other, [head, head], X), lf.fcall(other, head, X).expand(2, -1, -1))


def test_a_default_device_changes_nothing():
    """A default device is a torch function mode that calls public functions again."""
    model, batch = frozen("bert"), of_class()
    adapters = [lora(model, seed) for seed in range(2)]
    leaves = [leaf for one in adapters for leaf in lf.partition(one)[0].values()]

    def run():
        losses = lf.vcall(model, lf.stack(adapters), batch)
        return losses, torch.autograd.grad(losses.sum(), leaves)

    expected = run()
    with torch.device("cpu"):
        torch.testing.assert_close(run(), expected, rtol=0, atol=0)


def test_losses_are_split_by_a_mode_and_nothing_is_patched():
    seen = []

    def then(model, x):
        seen.append(nn.functional.mse_loss is original)
        return ModelOutput(loss=nn.functional.mse_loss(model.layer(x), x))

    original = nn.functional.mse_loss
    model = Own(then).requires_grad_(False)
    stacked = lf.stack([lora(model, seed) for seed in range(2)])
    assert lf.vcall(model, stacked, X).shape == (2,)
    assert all(seen)


class Centred(nn.Module):
    centre, calls = False, 0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, t=1.0):
        self.calls += 1
        y = self.layer(x) * t
        return y - y.mean(0) if self.centre else y


def test_a_refusal_ends_with_its_cause():
    model = Centred().requires_grad_(False)
    stacked = lf.stack([lora(model, seed) for seed in range(2)])
    model.centre = True
    with pytest.raises(lf.FoldError):
        lf.vcall(model, stacked, X)
    model.centre = False
    lf.vcall(model, stacked, X)


def test_another_number_is_the_same_kind_of_batch():
    model = Centred().requires_grad_(False)
    stacked = lf.stack([lora(model, seed) for seed in range(2)])
    lf.vcall(model, stacked, (X, 1.0))
    for t in range(100):
        model.calls = 0
        lf.vcall(model, stacked, (X, 1.1 + t))
        assert model.calls == 1
    verdicts = layout_of(model, stacked).verdicts
    assert len(verdicts) == 1
    for i in range(100):
        lf.vcall(model, stacked, (X, 1.0), check="first", strict=bool(i % 2))
    assert len(verdicts) == 1


def test_fallback_loops_over_a_fold_error_alone():
    def limited(error, most):
        def then(model, x):
            if len(x) > most:
                raise error
            return model.layer(x)

        model = Own(then).requires_grad_(False)
        return model, lf.stack([lora(model, seed) for seed in range(3)])

    for error in (MemoryError("out of memory"), torch.OutOfMemoryError("out"), KeyError("x")):
        model, stacked = limited(error, most=3)
        with pytest.raises(type(error)):
            lf.vcall(model, stacked, X, fallback="loop")
    model, stacked = limited(RuntimeError("shape"), most=3)
    with pytest.raises(lf.FoldError, match="not on those of one: RuntimeError: shape"):
        lf.vcall(model, stacked, X)
    assert lf.vcall(model, stacked, X, fallback="loop").shape == (3, 3, 4)
    model, stacked = limited(RuntimeError("always"), most=0)
    with pytest.raises(RuntimeError, match="always"):
        lf.vcall(model, stacked, X, fallback="loop")


def test_a_parameter_of_a_container_beside_an_adapted_layer():
    class WithToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.zeros(1, 1, 4)), nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(torch.cat([self.token.expand(len(x), -1, -1), x], 1))

    model, x = WithToken(), torch.randn(2, 3, 4)
    cfg = [lf.LoRA(r=2, target_modules="layer"), lf.Full(target_parameters="token")]
    adapters = [scramble(lf.init(model, cfg, seed=seed), seed) for seed in range(3)]
    with pytest.raises(lf.FoldError, match="token: its module runs other adapted modules"):
        lf.vcall(model, lf.stack(adapters), x)
    looped = lf.vcall(model, lf.stack(adapters), x, fallback="loop")
    same(looped, torch.stack([lf.fcall(model, one, x) for one in adapters]))


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm1d(4, track_running_stats=True), nn.SyncBatchNorm(4)]
)
def test_every_layer_with_running_statistics_is_refused_in_training(norm):
    model = nn.Sequential(nn.Linear(4, 4), norm).requires_grad_(False).train()
    stacked = lf.stack([lora(model, seed, target_modules="0") for seed in range(2)])
    with pytest.raises(lf.FoldError, match="its statistics are over the rows of all adapters"):
        lf.vcall(model, stacked, torch.randn(2, 4, 4))
    one = {key: leaf.detach() for key, leaf in lf.unstack(stacked)[0].items()}
    with pytest.raises(RuntimeError, match="writes its running statistics"):
        torch.func.grad(lambda p: lf.fcall(model, p, torch.randn(2, 4, 4)).sum())(one)


WEIGHTS = torch.rand(3, 4)
FORMS = {
    "mse with weights": lambda y, x: nn.functional.mse_loss(y, x, weight=WEIGHTS[:1] * x.abs()),
    "huber with weights": lambda y, x: nn.functional.huber_loss(y, x, weight=x.abs()),
    "bce with a weight for each class": lambda y, x: nn.functional.binary_cross_entropy_with_logits(
        y, x.sigmoid(), torch.arange(1.0, 5.0)
    ),
    "bce with a weight for each row": lambda y, x: nn.functional.binary_cross_entropy_with_logits(
        y, x.sigmoid(), weight=x.abs()
    ),
    "a term without rows": lambda y, x: (
        nn.functional.mse_loss(y, x) + nn.functional.mse_loss(torch.ones(5, 4), torch.zeros(5, 4))
    ),
    "all by name": lambda y, x: nn.functional.l1_loss(target=x, input=y, reduction="sum"),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("adapters", [2, 4, 5])
def test_forms_of_losses(form, adapters):
    model = Own(lambda model, x: ModelOutput(loss=form(model.layer(x), x))).requires_grad_(False)
    each = [lora(model, seed) for seed in range(adapters)]
    losses = lf.vcall(model, lf.stack(each), X, chunk=3)
    same(losses, torch.stack([lf.fcall(model, one, X) for one in each]))


@pytest.mark.parametrize("config", [lf.Full, lf.LoRA])
@pytest.mark.parametrize("frozen_base", [True, False])
def test_compiled(config, frozen_base):
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(not frozen_base)
    cfg = lf.Full(target_parameters="bias") if config is lf.Full else lf.LoRA(r=2)
    each = [scramble(lf.init(model, cfg, seed=seed), seed) for seed in range(2)]
    stacked = {key: leaf.detach() for key, leaf in lf.stack(each).items()}
    torch._dynamo.reset()
    compiled = torch.compile(lambda s: lf.vcall(model, s, X), backend="eager", fullgraph=True)
    same(compiled(stacked), lf.vcall(model, stacked, X))
    assert "forward" not in vars(model[0])


PAST = pytest.mark.filterwarnings("ignore:.past_key_values:FutureWarning")


@PAST
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_each_adapter_gets_its_cache(chunk):
    model = frozen("qwen3")
    adapters = [lora(model, seed) for seed in range(3)]
    ids = text(rows=2)["input_ids"]
    found = lf.vcall(model, adapters, {"input_ids": ids[:, :-1], "use_cache": True}, chunk=chunk)
    assert len(found.past_key_values) == 3
    for k, params in enumerate(adapters):
        alone = lf.fcall(model, params, {"input_ids": ids}).logits
        same(found.logits[k], alone[:, :-1])
        with lf.adapted(model, params):
            last = model(ids[:, -1:], past_key_values=found.past_key_values[k]).logits
        same(last[:, 0], alone[:, -1])


@PAST
def test_caches_reach_the_loss_and_the_loop():
    model, ids = frozen("qwen3"), text(rows=2)["input_ids"]
    adapters = [lora(model, seed) for seed in range(2)]
    batch = {"input_ids": ids, "use_cache": True}
    sums = lf.vcall(
        model, adapters, batch, loss_fn=lambda y, _: y.past_key_values.layers[1].keys.sum()
    )
    alone = [lf.fcall(model, one, batch).past_key_values.layers[1].keys.sum() for one in adapters]
    same(sums, torch.stack(alone))
    cache = lf.fcall(model, adapters[0], batch).past_key_values
    for fallback in ("raise", "loop"):
        with pytest.raises(ValueError, match="batch: holds a DynamicCache, which each adapter"):
            lf.vcall(model, adapters, batch | {"past_key_values": cache}, fallback=fallback)


@pytest.mark.parametrize("fallback", ["raise", "loop"])
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_results_that_are_no_tensors(chunk, fallback):
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    if fallback == "loop":
        model.append(nn.BatchNorm1d(4, track_running_stats=False))
    adapters = [lora(model, seed) for seed in range(3)]

    def results(y, batch):
        return {
            "loss": y.sum(),
            "number": y.sum().item(),
            "name": "x",
            "none": None,
            "rows": len(y),
        }

    found = lf.vcall(model, adapters, X, loss_fn=results, chunk=chunk, fallback=fallback)
    alone = [lf.fcall(model, one, X, loss_fn=results) for one in adapters]
    same(found["loss"], torch.stack([one["loss"] for one in alone]))
    assert found["number"] == pytest.approx([one["number"] for one in alone], rel=1e-4)
    assert (found["name"], found["none"], found["rows"]) == ("x", None, len(X))
    sizes = iter(range(1, 100))
    with pytest.raises(ValueError, match=r"results of the shapes \[.*\], which cannot be stacked"):
        lf.vcall(model, adapters, X, loss_fn=lambda y, _: y[0, : next(sizes)], fallback=fallback)
