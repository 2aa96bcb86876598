"""The calibration pass: which tensors a variant receives, and that the model is unchanged."""

import gc
from dataclasses import dataclass
from weakref import ref

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import lora_func as lf
from tests.support.models import batch_for, make


@dataclass(frozen=True, kw_only=True)
class Look(lf.LinearConfig):
    """A test variant that stores every tensor it observes."""

    kind: str = "inputs"

    @property
    def calibration(self):
        return self.kind


SEEN: list[tuple] = []


def _observe(cfg, acc, x, gy):
    SEEN.append((x, gy))
    return (acc or ()) + ((x.clone(), None if gy is None else gy.clone()),)


def _init(W, cfg, generator, stats):
    return {"g": torch.zeros(W.shape[0]), "_seen": torch.cat([x.flatten(0, -2) for x, _ in stats])}


def _apply(W, params, x):
    return lf.linear(x, W) * (1 + params["g"]) + 0 * params["_seen"].sum()


lf.register(
    lf.Variant(
        "look", Look, _init, _apply, leaves={"g": "d_out", "_seen": "tokens d_in"}, observe=_observe
    )
)


@pytest.fixture(autouse=True)
def _forget():
    SEEN.clear()


def seen(model, data, site, **settings):
    return lf.init(model, Look(**settings), data=data)[f"{site}.look._seen"]


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.side, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.down(self.dropout(self.up(x) * self.side(x)))


def test_every_site_sees_its_inputs_of_every_batch():
    model, data = Mlp(), [torch.randn(3, 4), torch.randn(2, 5, 4)]
    rows = torch.cat([batch.flatten(0, -2) for batch in data])
    assert torch.equal(seen(model, data, "up"), rows)
    torch.testing.assert_close(seen(model, data, "down"), model.up(rows) * model.side(rows))


def test_data_may_be_an_iterator_of_any_batches():
    model, x = Mlp(), torch.randn(3, 4)
    for batch in (x, (x,), [x], {"x": x}):
        assert torch.equal(seen(model, iter([batch]), "up"), x)


def test_sites_that_see_one_tensor_share_the_work_and_the_result():
    model = Mlp()
    lf.init(model, Look(), data=[torch.randn(3, 4), torch.randn(3, 4)])
    assert len(SEEN) == 2 * 2  # up and side share one tensor, down has its own
    SEEN.clear()
    cfg = Look(target_modules=["all-linear"])  # a list is unhashable
    lf.init(make("qwen3"), cfg, data=[batch_for(make("qwen3"))])
    assert len(SEEN) == 2 * 4  # four groups: q k v, o, gate up, down


def test_sites_that_part_ways_keep_their_own_statistics():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, other):
            return self.a(x) + self.b(x if other is None else other)

    x, y, z = torch.randn(3, 3, 4)
    params = lf.init(Two(), Look(), data=[(x, None), (y, z), (x, None)])
    assert torch.equal(params["a.look._seen"], torch.cat([x, y, x]))
    assert torch.equal(params["b.look._seen"], torch.cat([x, z, x]))


def test_gradients_are_those_of_the_outputs():
    model, data = Mlp().eval(), [torch.randn(3, 4)]
    lf.init(model, Look(kind="gradients"), data=data, loss_fn=lambda y, _: y.square().sum())
    gradients = {id(module): None for module in (model.up, model.side, model.down)}
    outputs = {}
    handles = [
        m.register_forward_hook(lambda m, args, y: outputs.__setitem__(id(m), y))
        for m in (model.up, model.side, model.down)
    ]
    loss = model(data[0]).square().sum()
    expected = torch.autograd.grad(loss, [outputs[key] for key in gradients])
    for handle in handles:
        handle.remove()
    for (_, gradient), other in zip(SEEN, expected, strict=True):
        torch.testing.assert_close(gradient, other)


def state(model):
    return {
        name: (dict(vars(module)), [*module._forward_hooks], module.training)
        for name, module in model.named_modules()
    }


def tensors(model):
    return {name: (p, p.grad, p.requires_grad, p._version) for name, p in model.named_parameters()}


class Stop(BaseException):
    pass


@pytest.mark.parametrize("kind", ["inputs", "gradients", "pairs"])
@pytest.mark.parametrize("stop", [None, 1, 2])
def test_nothing_is_left_behind(kind, stop, monkeypatch):
    model = Mlp()
    model.down.eval()
    model.up.register_forward_hook(lambda module, args, y: y + 1)
    model.dropout.register_forward_pre_hook(lambda module, args: None)
    random_state = torch.get_rng_state()
    modules, parameters = state(model), tensors(model)
    x = torch.ones(3, 2, 4)
    calls = []

    def data():
        for _ in range(3):
            if len(calls) == stop:
                raise Stop
            calls.append(1)
            yield (x, x) if kind == "pairs" else x

    sites = {"target_modules": "up|side|down"}
    if stop is None:
        lf.init(model, Look(kind=kind, **sites), data=data(), loss_fn=lambda y, _: y.sum())
    else:
        with pytest.raises(Stop):
            lf.init(model, Look(kind=kind, **sites), data=data(), loss_fn=lambda y, _: y.sum())
    assert state(model) == modules
    assert tensors(model) == parameters
    assert torch.equal(torch.get_rng_state(), random_state)


def test_an_error_inside_the_model_leaves_nothing_behind():
    model = Mlp()
    before = state(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        lf.init(model, Look(), data=[torch.randn(3, 5)])
    assert state(model) == before


def test_it_runs_in_eval_mode():
    model, x = Mlp().train(), torch.randn(3, 4)
    assert torch.equal(seen(model, [x], "down"), model.up(x) * model.side(x))
    assert model.training
    assert model.dropout.training


@pytest.mark.parametrize("cfg", [lf.EVA(r=2), lf.SHiRA(r=1, mask="snip"), lf.SSteer(mode="exp")])
def test_no_activation_is_kept(cfg):
    model, activations = Mlp(), []
    model.down.register_forward_pre_hook(lambda module, args: activations.append(ref(args[0])))

    def data():
        for i in range(3):
            x = torch.randn(3, 3, 4)
            yield (x, torch.randn(3, 3, 4)) if cfg.calibration == "pairs" else x
            gc.collect()
            assert len(activations) >= i + 1
            assert not any(activation() is not None for activation in activations)

    lf.init(model, cfg, data=data(), loss_fn=lambda y, _: y.square().sum())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_padding_is_left_out(family, side):
    model = make(family)
    batch = batch_for(model)
    if side == "left":
        batch = {k: v.flip(1) if v.ndim == 2 else v for k, v in batch.items()}
    site = "model.layers.0.self_attn.q_proj"
    if family == "bert":
        site = "bert.encoder.layer.0.attention.self.query"
    rows = seen(model, [batch], site)
    assert len(rows) == batch["attention_mask"].sum() < batch["attention_mask"].numel()
    changed = batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)}
    assert torch.equal(rows, seen(model, [changed], site))


def test_the_last_real_token_of_a_pair():
    model, batch = make("qwen3"), batch_for(make("qwen3"))
    site = "model.layers.0.self_attn.q_proj"
    everything = seen(model, [batch | {"attention_mask": torch.ones(3, 10)}], site).view(3, 10, 32)
    for side in ("left", "right"):
        mask = batch["attention_mask"] if side == "right" else batch["attention_mask"].flip(1)
        last = everything[torch.arange(3), torch.tensor([9, 6 if side == "right" else 9, 9])]
        one = batch | {"attention_mask": mask}
        pairs = [(one, batch | {"attention_mask": torch.ones(3, 10)})]
        found = seen(model, pairs, site, kind="pairs", layers=0)
        torch.testing.assert_close(found, torch.cat([last, everything[:, -1]]))


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(num_layers=1, decoder_start_token_id=0, **sizes))
    return model.eval()


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **batch):
        return self.inner(**batch)


def test_an_encoder_and_a_decoder():
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    ids, labels = torch.randint(1, 64, (2, 5)), torch.randint(1, 64, (2, 4))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    cfg = Look(target_modules=r"(\.q|\.v)$")
    with pytest.raises(ValueError, match=r"data: got attention_mask alone, .* pass attention_"):
        lf.init(t5(), cfg, data=[batch])
    with pytest.raises(ValueError, match="data: got attention_mask alone"):
        lf.init(Wrapper(t5()), cfg, data=[batch])
    both = batch | {"decoder_attention_mask": torch.ones(2, 4)}
    params = lf.init(t5(), cfg, data=[both])
    rows = {key: len(leaf) for key, leaf in params.items() if key.endswith("_seen")}
    decoder = "decoder.block.0.layer"
    assert rows == {
        "encoder.block.0.layer.0.SelfAttention.q.look._seen": 6,
        "encoder.block.0.layer.0.SelfAttention.v.look._seen": 6,
        f"{decoder}.0.SelfAttention.q.look._seen": 8,
        f"{decoder}.0.SelfAttention.v.look._seen": 8,
        f"{decoder}.1.EncDecAttention.q.look._seen": 8,
        f"{decoder}.1.EncDecAttention.v.look._seen": 6,
    }
    square = batch | {"labels": ids, "decoder_attention_mask": torch.ones(2, 5)}
    with pytest.raises(ValueError, match=r"q: which of its rows \(2, 5\) are padding cannot"):
        lf.init(t5(), cfg, data=[square])
    lf.init(t5(), cfg, data=[square | {"attention_mask": torch.ones(2, 5)}])


def test_a_mask_may_come_by_position():
    model, batch = make("bert"), batch_for(make("bert"))
    site = "bert.encoder.layer.0.attention.self.query"
    by_name = seen(model, [batch], site)
    assert torch.equal(by_name, seen(model, [(batch["input_ids"], batch["attention_mask"])], site))


def test_rows_of_another_order_than_the_mask_are_refused():
    class Transposed(Skips):
        def forward(self, x, attention_mask):
            return self.used(x.transpose(0, 1))

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x, attention_mask):
            return self.experts[0](x.flatten(0, 1).flip(0))

    batch = {"x": torch.randn(3, 2, 4), "attention_mask": HALF}
    for model in (Transposed(), Experts()):
        with pytest.raises(ValueError, match="are padding cannot be told from"):
            lf.init(model, Look(), data=[batch])
        cfg = Look(target_modules=r"^used|experts")
        lf.init(model, cfg, data=[batch | {"attention_mask": torch.ones(3, 2)}])


def test_what_a_layer_saw_is_what_counts_also_when_it_is_overwritten():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = x.clone()
            h += self.a(h)
            return self.b(h)

    model, x = InPlace(), torch.randn(3, 5, 4)
    h = x + model.a(x)
    params = lf.init(model, Look(), data=[x])
    assert torch.equal(params["a.look._seen"], x.flatten(0, 1))
    torch.testing.assert_close(params["b.look._seen"], h.detach().flatten(0, 1))
    pairs = lf.init(model, Look(kind="pairs"), data=[(x, x)])
    assert torch.equal(pairs["a.look._seen"], torch.cat([x[:, -1], x[:, -1]]))
    with pytest.raises(ValueError, match="a: its input was overwritten in place after it ran"):
        lf.init(model, Look(kind="gradients"), data=[x], loss_fn=lambda y, _: y.sum())


def test_fused_inference_kernels_are_off():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)

        def forward(self, x, attention_mask):
            return self.encoder(x, src_key_padding_mask=attention_mask == 0)

    batch = {"x": torch.randn(3, 2, 8), "attention_mask": HALF}
    model = Encoder().eval().requires_grad_(False)
    params = lf.init(model, Look(target_modules="linear1"), data=[batch])
    assert len(params["encoder.layers.0.linear1.look._seen"]) == 5


def test_a_part_that_was_compiled_and_has_run():
    model, x = nn.Sequential(nn.Sequential(nn.Linear(4, 4))), torch.randn(3, 4)
    model[0] = torch.compile(model[0], backend="eager", fullgraph=True)
    with torch.no_grad():
        model(x)
    (key,) = (k for k in lf.init(model, Look(), data=[x]) if k.endswith("_seen"))
    assert torch.equal(lf.init(model, Look(), data=[x])[key], x)


def test_in_inference_mode_the_adapter_can_be_trained_all_the_same():
    model, x = Mlp(), torch.randn(9, 4)
    cfg = [lf.EVA(r=2, target_modules="up"), lf.Full(target_parameters="down")]
    with torch.inference_mode():
        params = lf.init(model, cfg, data=[x, x.clone()])
        lora = lf.init(model, lf.LoRA(r=2))
    lf.fcall(model, params, x).sum().backward()
    lf.fcall(model, lora, x).sum().backward()


def test_autocast_does_not_round_the_statistics():
    model, x = Mlp().eval(), torch.randn(9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        lf.init(model, Look(target_modules="up"), data=[x])
        params = lf.init(model, lf.EVA(r=2, target_modules="up"), data=[x])
    exact = lf.init(model, lf.EVA(r=2, target_modules="up"), data=[x])
    torch.testing.assert_close(params["up.eva.A"], exact["up.eva.A"])


def test_a_module_that_runs_twice_is_seen_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) + self.layer(input=x)

    x = torch.randn(3, 4)
    assert torch.equal(seen(Twice(), [x], "layer"), torch.cat([x, x]))


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, **masks):
        return self.used(x)


X = torch.randn(3, 4)
HALF = torch.tensor([[1, 0], [1, 1], [1, 1]])


@pytest.mark.parametrize(
    ("cfg", "data", "error", "message"),
    [
        (lf.LoRA(r=2), [X], ValueError, "data: taken by none of the configs"),
        (
            [Look(target_modules="^used"), lf.SSteer(target_modules="unused")],
            [X],
            ValueError,
            r"data: taken by \{'Look': 'inputs', 'SSteer': 'pairs'\}, of one kind at a time",
        ),
        (Look(), X, TypeError, "data: got one Tensor, expected an iterable of batches"),
        (Look(), {"x": X}, TypeError, "data: got one dict, expected an iterable of batches"),
        (Look(), [], ValueError, "used: saw nothing of 0 batches: there is none"),
        (Look(), ["text"], TypeError, "batch: got str, expected a mapping"),
        (Look(), [X], ValueError, "unused: saw nothing of 1 batches: there is none, the layer did"),
        (
            Look(kind="gradients"),
            [X],
            TypeError,
            r"data: gradients need a scalar loss .* gave \(3, 4\); put",
        ),
        (Look(kind="pairs"), [X], TypeError, "data: got Tensor, expected pairs"),
        (Look(kind="pairs"), [(X[None], X[None, :2])], ValueError, "unused: saw nothing"),
        (
            Look(kind="pairs"),
            [({"x": X[:, None], "attention_mask": torch.tensor([[1], [0], [1]])}, X[:, None])],
            ValueError,
            "used: a row of the batch is all padding and has no last token",
        ),
        (
            Look(),
            [{"x": X, "attention_mask": {"full_attention": HALF}}],
            ValueError,
            "attention_mask: got dict, from which padding cannot be told",
        ),
        (Look(), 5, TypeError, "data: got one int, expected an iterable of batches"),
        (Look(kind="pairs"), [(X, X)], ValueError, r"used: its input has shape \(3, 4\); the last"),
        (
            Look(kind="pairs"),
            [(X[None], X[:, None])],
            ValueError,
            "used: 1 positive rows, 3",
        ),
        (
            Look(),
            [{"x": X[:2], "attention_mask": HALF}],
            ValueError,
            r"used: which of its rows \(2,\) are padding cannot be told from .*\(3, 2\)",
        ),
        (
            Look(),
            [{"x": X[:2], "attention_mask": HALF[None]}],
            ValueError,
            r"^attention_mask: got \(1, 3, 2\), .* pass a tensor of \(batch, tokens\)",
        ),
    ],
)
def test_refuses(cfg, data, error, message):
    with pytest.raises(error, match=message):
        lf.init(Skips(), cfg, data=data)


def test_a_model_that_runs_with_an_adapter_is_refused():
    model = Mlp()
    before = state(model)
    with lf.adapted(model, lf.init(model, lf.LoRA(r=2))):
        with pytest.raises(lf.BusyModelError):
            lf.init(model, Look(), data=[torch.randn(3, 4)])
    assert state(model) == before


def test_gradients_that_never_come_name_the_site():
    class Detached(Skips):
        def forward(self, x):
            return self.used(x).detach() + self.unused(x)

    with pytest.raises(ValueError, match=r"used: saw nothing of 1 batches: .*or the loss does"):
        lf.init(Detached(), Look(kind="gradients"), data=[X], loss_fn=lambda y, _: y.sum())


def test_what_is_made_from_data_is_saved_with_the_adapter():
    model, x = Mlp().eval().requires_grad_(False), torch.randn(9, 4)
    params = lf.init(model, lf.EVA(r=2), data=[x])
    again = {key: leaf.detach().clone() for key, leaf in params.items()}
    assert torch.equal(lf.fcall(model, again, x), model(x))
