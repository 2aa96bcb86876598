"""4-bit and 8-bit bases: every variant, every transform, and parity with bitsandbytes."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lora_func as lf
from lora_func.weights import Affine, affine, dense, linear, matmul_weight
from tests.support.compiled import FUNCTIONS as COMPILED
from tests.support.compiled import adapters as adapters_to_compile
from tests.support.compiled import assert_one_graph
from tests.support.models import batch_for, make, scramble
from tests.support.pairs import ADAPTERS, adapter
from tests.support.quantised import KINDS, dequantised, make_quantised, quantise_layer, quantised
from tests.support.snapshots import assert_same, snapshot

EACH_KIND = pytest.mark.parametrize("kind", KINDS)
EACH_VARIANT = pytest.mark.parametrize("case", ADAPTERS, ids=str)
EACH_MODE = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
OVER_ADAPTERS = (None, 0, None)


def same(ours, theirs, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def near(ours, theirs, tolerance):
    """Compare the norm over all leaves; one different 8-bit rounding changes a value by 1/127."""
    error = sum((ours[key] - tensor).square().sum() for key, tensor in theirs.items())
    assert error.sqrt() <= tolerance * sum(t.square().sum() for t in theirs.values()).sqrt()


def gradients(model, params, batch):
    trained, constants = lf.partition(params)
    found = torch.autograd.grad(
        lf.fcall(model, trained | constants, batch), [*trained.values()], allow_unused=False
    )
    return dict(zip(trained, found, strict=True))


def layer_of(kind, compute_dtype=torch.float32, bias=True, training=False):
    return quantise_layer(nn.Linear(64, 48, bias).train(training), kind, compute_dtype)


@EACH_KIND
@EACH_MODE
@pytest.mark.parametrize("rows", [0, 1, 64, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_layer_is_bitsandbytes_own(kind, training, rows, dtype):
    """Equal bit for bit. bitsandbytes casts the bias permanently, so its forward runs last."""
    layer = layer_of(kind, None, training=training)
    x = torch.randn(rows, 64, dtype=dtype, requires_grad=True)
    before = snapshot(layer)
    ours = linear(x, affine(layer))
    slopes = torch.randn_like(ours)
    (gradient,) = torch.autograd.grad(ours, x, slopes)
    assert_same(before, layer)
    theirs = layer(x)
    assert ours.dtype == theirs.dtype == dtype
    assert torch.equal(ours, theirs)
    if kind.startswith("int8"):
        assert torch.equal(gradient, torch.autograd.grad(theirs, x, slopes)[0])
    else:  # bitsandbytes first dequantises to the dtype of the checkpoint
        same(gradient, torch.autograd.grad(theirs, x, slopes)[0], rtol=2e-2, atol=2e-2)


@EACH_KIND
@EACH_MODE
@pytest.mark.parametrize("rows", [1, 64, 2048])
def test_a_layer_is_its_dense_reference(kind, training, rows):
    layer, x = layer_of(kind, training=training), torch.randn(rows, 64)
    W = affine(layer)
    reference = nn.functional.linear(x, dense(W), W.bias)
    if kind.startswith("int8") and not training:
        # each input is rounded to 1/127 of the largest value in its row
        assert (linear(x, W) - reference).norm() < 0.02 * reference.norm()
        assert not torch.equal(linear(x, W), reference)
    else:
        assert torch.equal(linear(x, W), reference)
    A = torch.randn(3, 64)
    same(matmul_weight(A, W), A @ dense(W).mT)


@EACH_KIND
@EACH_MODE
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_transforms_of_a_layer(kind, training, bias):
    """Gradients equal the dense layer's: 8-bit rounding is the identity (straight-through)."""
    layer = layer_of(kind, bias=bias, training=training)
    W, x, slopes = affine(layer), torch.randn(5, 64), torch.randn(5, 48)
    thread = torch.randn(4, 48)

    def dense_layer(x, b):
        return nn.functional.linear(x, dense(W), b)

    def ours(x, b):
        return linear(x, W._replace(bias=b))

    def slopes_of(layer):
        (of_x,) = torch.func.vjp(lambda x: layer(x, W.bias), x)[1](slopes)
        of_both = torch.func.vjp(layer, x, W.bias)[1](slopes) if bias else ()
        tangents = (torch.sin(x), torch.ones(48))
        moved = torch.func.jvp(layer, (x, W.bias), tangents)[1] if bias else of_x
        return (of_x, *of_both, moved)

    same(slopes_of(ours), slopes_of(dense_layer))
    same(
        torch.func.jvp(lambda x: ours(x, W.bias), (x,), (x,))[1],
        torch.func.jvp(lambda x: dense_layer(x, W.bias), (x,), (x,))[1],
    )
    squared = [lambda x, f=f: f(x, None).square().sum() for f in (ours, dense_layer)]
    hessian = [torch.func.jvp(torch.func.grad(f), (x,), (x,))[1] for f in squared]
    if not kind.startswith("int8") or training:
        same(hessian[0], hessian[1])

    together = torch.randn(4, 5, 64)
    loop = torch.stack([ours(one, W.bias) for one in together])
    assert torch.equal(torch.vmap(ours, (0, None))(together, W.bias), loop)
    assert torch.equal(
        torch.vmap(ours, (1, None), 1)(together.movedim(0, 1), W.bias), loop.movedim(0, 1)
    )
    own = torch.stack([ours(one, b) for one, b in zip(together, thread, strict=True)])
    same(torch.vmap(ours)(together, thread), own)
    same(torch.vmap(ours, (None, 0))(x, thread), torch.stack([ours(x, b) for b in thread]))
    of_all = torch.vmap(torch.func.grad(lambda x: ours(x, W.bias).square().sum()))(together)
    each = [torch.func.grad(lambda x: ours(x, W.bias).square().sum())(one) for one in together]
    same(of_all, torch.stack(each))


def make_adapter(case, kind, training=False, **settings):
    """A case's adapter on Qwen3, or on BERT if the case needs a bias."""
    model = make_quantised("bert" if case.bias else "qwen3", kind, **settings).train(training)
    return model, adapter(case, model), batch_for(model)


@EACH_VARIANT
@EACH_KIND
@EACH_MODE
def test_the_start_is_the_base_model_bit_for_bit(case, kind, training):
    if case.start == "elsewhere":
        pytest.skip("does not start as the base")
    model, params, batch = make_adapter(case, kind, training)
    before = snapshot(model)
    ours = lf.fcall(model, params, batch)
    assert_same(before, model)
    if case.start == "exact":
        assert torch.equal(ours, model(**batch).loss)
    else:
        same(ours, model(**batch).loss, rtol=1e-2 if kind.startswith("int8") else 1e-5)


def assert_gradients(model, params, batch, agree):
    """Check the gradients from autograd and from torch.func.grad."""
    found = gradients(model, params, batch)
    agree(found)
    functional = torch.func.grad(lf.fcall, argnums=1)(model, params, batch)
    agree({key: functional[key] for key in found})


@EACH_VARIANT
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_gradients_are_those_on_the_dequantised_model(case, kind):
    model, params, batch = make_adapter(case, kind)
    params, before = scramble(params), snapshot(model)
    expected = gradients(dequantised(model), params, batch)
    assert_gradients(model, params, batch, lambda found: same(found, expected))
    trained, constants = lf.partition({key: leaf.detach() for key, leaf in params.items()})
    tangents = {key: torch.randn_like(leaf) for key, leaf in trained.items()}
    _, slope = torch.func.jvp(
        lambda leaves: lf.fcall(model, leaves | constants, batch), (trained,), (tangents,)
    )
    same(slope, sum((expected[key] * tangents[key]).sum() for key in tangents), rtol=1e-3)
    assert_same(before, model)
    model.train().activation_checkpointing_enable()
    assert_gradients(model, params, batch, lambda found: same(found, expected))


@EACH_VARIANT
@pytest.mark.parametrize("kind", ["int8", "int8, outliers"])
def test_8_bit_gradients_are_near_those_on_the_dequantised_model(case, kind):
    """Inputs are exact in training mode on a CPU; otherwise they are rounded to 1/127."""
    model, params, batch = make_adapter(case, kind)
    params = scramble(params)
    expected = gradients(dequantised(model), params, batch)
    assert_gradients(model, params, batch, lambda found: near(found, expected, 0.25))
    model.train()
    assert_gradients(model, params, batch, lambda found: same(found, expected))
    model.activation_checkpointing_enable()
    assert_gradients(model, params, batch, lambda found: same(found, expected))


@EACH_VARIANT
@EACH_KIND
def test_a_sweep_equals_vmap_equals_solo_runs(case, kind):
    """8-bit layers run in training mode, where the inputs are not rounded."""
    model, first, batch = make_adapter(case, kind, training=kind.startswith("int8"))
    adapters = [scramble(first), scramble(adapter(case, model, seed=1), seed=1)]
    stacked = lf.stack(adapters)
    loop = torch.stack([lf.fcall(model, one, batch) for one in adapters])
    expected = [gradients(model, one, batch) for one in adapters]
    same(torch.vmap(lf.fcall, OVER_ADAPTERS)(model, stacked, batch), loop)
    losses = lf.vcall(model, stacked, batch)
    same(losses, loop)
    assert loop[0] != loop[1]
    together = torch.autograd.grad(losses.sum(), [*lf.partition(adapters[0])[0].values()])
    same(dict(zip(expected[0], together, strict=True)), expected[0])
    detached = {key: leaf.detach() for key, leaf in stacked.items()}
    of_all = torch.vmap(torch.func.grad(lf.fcall, argnums=1), OVER_ADAPTERS)(model, detached, batch)
    for k, one in enumerate(expected):
        same({key: of_all[key][k] for key in one}, one)


def test_layers_without_an_adapter_have_derivatives_too():
    """bitsandbytes' own layers fail under grad and silently drop tangents."""
    model = make_quantised("qwen3", "nf4")
    before, batch = snapshot(model), batch_for(model)
    params = scramble(lf.init(model, lf.LoRA(r=2, target_modules=r"layers\.0\.self_attn\.q_proj")))
    expected = gradients(dequantised(model), params, batch)
    assert_gradients(model, params, batch, lambda found: same(found, expected))
    trained, constants = lf.partition({key: leaf.detach() for key, leaf in params.items()})
    _, slope = torch.func.jvp(
        lambda leaves: lf.fcall(model, leaves | constants, batch), (trained,), (trained,)
    )
    same(slope, sum((expected[key] * trained[key]).sum() for key in trained))
    assert_same(before, model)


@pytest.mark.parametrize("kind", ["nf4", "int8, outliers"])
def test_trained_norms_biases_and_heads(kind):
    model = make_quantised("bert", kind)
    before, batch = snapshot(model), batch_for(model)
    cfg = [
        lf.LoRA(r=2, target_modules="query|value"),
        lf.Full(target_parameters=r"LayerNorm|classifier|(intermediate|output)\.dense\.bias"),
    ]
    adapters = [scramble(lf.init(model, cfg, seed=seed), seed) for seed in range(2)]
    loop = torch.stack([lf.fcall(model, one, batch) for one in adapters])
    stacked = lf.stack(adapters)
    same(torch.vmap(lf.fcall, OVER_ADAPTERS)(model, stacked, batch), loop)
    same(lf.vcall(model, stacked, batch), loop)
    near_zero = gradients(dequantised(model), adapters[0], batch)
    near(gradients(model, adapters[0], batch), near_zero, 0.25)
    assert_same(before, model)


@pytest.mark.parametrize("target", ["all-linear", r"layers\.0\.self_attn\.q_proj"])
def test_an_adapter_of_an_8_bit_sweep_does_not_see_the_others(target):
    """LLM.int8 selects outlier columns over all rows, also in layers without an adapter."""
    model = make_quantised("qwen3", "int8, outliers")
    batch, cfg = batch_for(model), lf.LoRA(r=2, target_modules=target)
    adapters = [scramble(lf.init(model, cfg, seed=seed), seed) for seed in range(3)]
    alone = torch.stack([lf.fcall(model, one, batch) for one in adapters])
    loud = {key: leaf * 50 for key, leaf in adapters[1].items()}
    elsewhere = lf.stack([lf.init(model, lf.LoRA(r=2, target_modules="mlp"))])
    for others in ([], [elsewhere]):
        with_others = lf.vcall(model, [lf.stack(adapters), *others], batch)
        same(with_others[:3], alone)
        with_loud = lf.vcall(model, [lf.stack([adapters[0], loud, adapters[2]]), *others], batch)
        assert torch.equal(with_loud[[0, 2]], with_others[[0, 2]])
        assert not torch.equal(with_loud[1], with_others[1])
    same(torch.vmap(lf.fcall, OVER_ADAPTERS)(model, lf.stack(adapters), batch), alone)


@EACH_KIND
def test_nothing_dense_is_kept_for_the_backward_pass(kind):
    layer, x = layer_of(kind, training=True), torch.randn(2, 64, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(x, affine(layer)).square().sum().backward()
    assert {*kept} == {torch.Size([2, 48])}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("transform", [*COMPILED, "jvp"])
def test_compiled(kind, transform):
    model = quantised(make("qwen3", num_hidden_layers=1), kind)
    model.train("vmap" in transform or transform == "jvp" or transform == "vcall")
    inputs, batch = adapters_to_compile(model, 0), batch_for(model)
    function, stacked = COMPILED.get(transform, (along, False))
    params = lf.stack(inputs) if stacked else inputs[0]
    assert_one_graph(function, model, batch, [params], "aot_eager")


def along(model, params, batch):
    return torch.func.jvp(lambda leaves: lf.fcall(model, leaves, batch), (params,), (params,))


@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_half_precision(kind, compute_dtype):
    """In bfloat16 the initial output equals the base bit for bit; a sweep equals solo runs."""
    model = quantised(make("qwen3", torch.bfloat16), kind, compute_dtype)
    batch, cfg = batch_for(model), [lf.LoRA(r=2), lf.Full(target_parameters="norm")]
    start = lf.init(model, cfg)
    assert torch.equal(lf.fcall(model, start, batch), model(**batch).loss)
    adapters = [scramble(lf.init(model, cfg, seed=seed), seed) for seed in range(2)]
    loop = torch.stack([lf.fcall(model, one, batch) for one in adapters])
    same(lf.vcall(model, lf.stack(adapters), batch), loop, rtol=1e-2)


@EACH_KIND
@EACH_MODE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autocast(kind, training, dtype):
    """The dtypes equal bitsandbytes'; they differ between 4 and 8 bits."""
    layer, x = layer_of(kind, None, training=training), torch.randn(5, 64, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear(x.requires_grad_(), affine(layer))
        theirs = layer(x)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    slopes = torch.randn_like(ours)
    gradient = torch.autograd.grad(ours, x, slopes)[0]
    same(gradient, torch.autograd.grad(theirs, x, slopes)[0], rtol=2e-2, atol=2e-2)
    assert gradient.dtype == dtype


@EACH_KIND
def test_a_model_in_float16(kind):
    """bitsandbytes' outlier kernel temporarily overwrites its input."""
    model = quantised(make("qwen3", torch.float16), kind)
    batch, params = batch_for(model), scramble(lf.init(model, lf.LoRA(r=2)))
    found = gradients(model, params, batch)
    assert all(gradient.isfinite().all() for gradient in found.values())
    same(lf.vcall(model, lf.stack([params, params]), batch)[1], lf.fcall(model, params, batch))
    lf.init(model, lf.SHiRA(r=1, mask="snip"), data=[batch])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_nothing_dense_is_kept_when_compiled(kind):
    """The compiler saves a dense weight if forward and backward both compute it."""
    layers = [quantise_layer(nn.Linear(256, 256), kind) for _ in range(4)]
    model = nn.Sequential(*layers).eval().requires_grad_(False)
    params, kept = lf.init(model, lf.LoRA(r=2)), []

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    torch._dynamo.reset()
    compiled = torch.compile(lf.fcall, fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = compiled(model, params, torch.randn(4, 256))
    y.sum().backward()
    assert torch.Size([4, 256]) in kept
    assert torch.Size([256, 256]) not in kept


def test_calibration_leaves_the_model_as_it_was():
    """bitsandbytes would cast a bias permanently."""
    model = make_quantised("bert", "nf4")
    for name, parameter in model.named_parameters():
        if name.endswith("dense.bias"):
            parameter.data = parameter.data.bfloat16()
    before, batch = snapshot(model), batch_for(model)
    lf.init(model, lf.EVA(r=2, target_modules="query"), data=[batch])
    assert_same(before, model)


def test_a_plan_does_not_outlive_its_modules():
    """A new module may reuse the memory address (and ``id``) of a deleted one."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    start = lf.init(model, lf.LoRA(r=2, target_modules="0"))
    params = {key: leaf.detach() + 0.1 for key, leaf in start.items()}
    x = torch.randn(3, 64)
    for _ in range(20):
        model[1] = nn.Linear(64, 64).requires_grad_(False)
        lf.fcall(model, params, x)
        packed = quantise_layer(nn.Linear(64, 64), "nf4")
        model[1] = None
        model[1] = packed
        del packed
        tangents = {key: torch.ones_like(leaf) for key, leaf in params.items()}
        _, slope = torch.func.jvp(lambda p: lf.fcall(model, p, x), (params,), (tangents,))
        assert slope.any()


def test_a_layer_that_derives_from_a_quantised_one():
    class Doubled(bnb.nn.Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(64, 64), Doubled(64, 4, compute_dtype=torch.float32))
    model.to("cpu").requires_grad_(False)
    params = lf.init(model, lf.LoRA(r=2, target_modules="0"))

    def loss(y, _):
        return y.sum()

    lf.fcall(model, params, torch.ones(2, 64), loss_fn=loss).backward()
    with pytest.raises(RuntimeError, match=r"^1: derives from a quantised layer"):
        torch.func.grad(lf.fcall, argnums=1)(model, params, torch.ones(2, 64), loss_fn=loss)


@pytest.mark.parametrize("kind", ["nf4", "int8", "int8, outliers"])
def test_rows_that_depend_on_each_other_are_found(kind):
    """The check also works on models with 8-bit layers, in spite of their rounding."""

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), layer_of(kind)

        def forward(self, x):
            x = self.first(x)
            return self.second(x - 0.05 * x.mean(0, keepdim=True))

    model = Mixing().requires_grad_(False)
    adapters = [lf.init(model, lf.LoRA(r=2, target_modules="first"), seed=s) for s in range(2)]
    with pytest.raises(lf.FoldError, match="its rows depend on each other"):
        lf.vcall(model, lf.stack(adapters), torch.randn(3, 64))


def test_a_constant_through_a_quantised_layer():
    """The constant is the same for all adapters."""

    class WithConstant(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 48), layer_of("int8, outliers")
            self.constant = nn.Parameter(torch.randn(1, 64))

        def forward(self, x):
            return self.first(x) + self.second(self.constant)

    model, x = WithConstant().requires_grad_(False), torch.randn(3, 64)
    adapters = [scramble(lf.init(model, lf.LoRA(r=2, target_modules="first"))) for _ in range(2)]
    same(lf.vcall(model, lf.stack(adapters), x)[0], lf.fcall(model, adapters[0], x))


@pytest.mark.parametrize("bits", [4, 8])
def test_through_transformers(tmp_path, bits):
    """Load with ``from_pretrained``, train, generate; the model is unchanged afterwards."""
    make("qwen3").save_pretrained(tmp_path)
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True} | (settings if bits == 4 else {}))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    for layer in model.modules():
        layer.support_avx512bf16_for_cpu = False
    batch, cfg = batch_for(model), lf.LoRA(r=4, alpha=16)
    assert len(lf.find_targets(model, cfg)) == len(lf.find_targets(make("qwen3"), cfg)) == 14
    params, frozen = lf.init(model, cfg), model(**batch).loss
    before = snapshot(model)
    assert torch.equal(lf.fcall(model, params, batch), frozen)
    optimizer = torch.optim.AdamW([*lf.partition(params)[0].values()], lr=1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        loss = lf.fcall(model, params, batch)
        loss.backward()
        optimizer.step()
    assert loss < 0.9 * frozen
    with lf.adapted(model, params):
        tokens = model.generate(batch["input_ids"][:1, :4], max_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, 7)
    assert_same(before, model)
    size = sum(parameter.numel() for parameter in make("qwen3").parameters())
    trained = sum(leaf.numel() for leaf in lf.partition(params)[0].values())
    assert f"{trained / size:.3%}" in lf.summary(params, model).caption


@EACH_KIND
def test_a_skeleton_shares_what_is_quantised(kind):
    model = make_quantised("qwen3", kind)
    batch, params = batch_for(model), scramble(lf.init(model, lf.LoRA(r=2)))
    model(**batch)  # an 8-bit layer moves its codes at the first call
    other = lf.skeleton(model)
    layer, copied = (m.model.layers[0].mlp.up_proj for m in (model, other))
    assert copied is not layer
    assert copied.weight is layer.weight
    assert all(getattr(copied, a) is getattr(layer, a) for a in ("state",) if hasattr(layer, a))
    assert torch.equal(lf.fcall(other, params, batch), lf.fcall(model, params, batch))
    with lf.adapted(model, params):
        assert torch.equal(lf.fcall(other, params, batch), lf.fcall(other, params, batch))


def test_models_that_share_a_quantised_layer_run_one_at_a_time():
    """The shared layer runs a replaced forward in both models, even without an adapter."""
    shared = layer_of("nf4")
    one, two = (nn.Sequential(nn.Linear(64, 64), shared).requires_grad_(False) for _ in range(2))
    params = lf.init(one, lf.LoRA(r=2, target_modules="0"))
    with lf.adapted(one, params), pytest.raises(lf.BusyModelError):
        lf.fcall(two, params, torch.ones(1, 64))


def test_what_is_not_quantised_storage_is_refused():
    x = torch.ones(1, 64)
    raw = nn.Sequential(bnb.nn.Linear4bit(64, 48), nn.Linear(48, 2)).requires_grad_(False)
    with pytest.raises(ValueError, match=r"^0: its weight is not quantised yet"):
        lf.init(raw, lf.LoRA(r=2))
    head = lf.init(raw, lf.LoRA(r=2, target_modules="1"))
    stacked = lf.stack([head, head])
    for call in (
        lambda: lf.fcall(raw, head, x),
        lambda: lf.vcall(raw, stacked, x),
        lambda: lf.vcall(raw, stacked, x, check="never"),
        lambda: lf.find_targets(raw, lf.LoRA(target_roles="reader")),
    ):
        with pytest.raises(ValueError, match=r"^0: its weight is not quantised yet"):
            call()
    trained = nn.Sequential(bnb.nn.Linear8bitLt(64, 48), nn.Linear(48, 2))
    with pytest.raises(TypeError, match=r"^0: a Linear8bitLt with has_fp16_weights=True"):
        lf.init(trained, lf.LoRA(r=2))
    repacked = nn.Sequential(layer_of("nf4"))
    repacked[0].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"^0: bitsandbytes has repacked this weight"):
        lf.init(repacked, lf.LoRA(r=2))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_codes_are_not_taken_for_numbers(storage):
    model = nn.Sequential(
        bnb.nn.Embedding4bit(70, 64, quant_storage=storage),
        bnb.nn.Linear4bit(64, 48, quant_storage=storage, compute_dtype=torch.float32),
    )
    model.to("cpu").requires_grad_(False)
    model[1].support_avx512bf16_for_cpu = False
    ids = torch.arange(6).view(2, 3)
    with pytest.raises(ValueError, match=r"'0' matches no site, but 0 \(a .*Embedding4bit"):
        lf.init(model, lf.LoRA(r=2, target_modules="0"))
    with pytest.raises(TypeError, match="packed by bitsandbytes; name its module"):
        lf.init(model, lf.LoRA(r=2, target_modules=(), target_parameters="1.weight"))
    with pytest.raises(TypeError, match=r"1\.weight: a packed weight cannot be trained"):
        lf.init(model, lf.Full(target_parameters="1.weight"))
    params = lf.init(model, lf.DoRA(r=2))
    assert torch.equal(lf.fcall(model, params, ids), model(ids))
    assert lf.summary(params, model).caption.startswith(
        f"{(2 * 112 + 48) / (70 * 64 + 65 * 48):.3%}"
    )


def test_accelerates_hooks_stay_at_work():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubled(ModelHook):
        def pre_forward(self, module, x):
            return (2 * x,), {}

    model, x = nn.Sequential(layer_of("nf4"), nn.Linear(48, 2)), torch.ones(1, 64)
    add_hook_to_module(model[0], Doubled())
    for target in ("0", "1"):
        params = lf.init(model, lf.LoRA(r=2, target_modules=target))
        assert torch.equal(lf.fcall(model, params, x), model(x))


@pytest.mark.gpu
@EACH_KIND
@pytest.mark.parametrize("rows", [1, 5, 64, 320, 1536, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_layer_on_a_gpu(kind, rows, dtype):
    """Up to 1,536 rows may use a fused kernel, which alone loses gradients under vmap."""
    layer = quantise_layer(nn.Linear(1024, 512).cuda(), kind, dtype)
    W, x = affine(layer), torch.randn(rows, 1024, dtype=dtype, device="cuda", requires_grad=True)
    assert torch.equal(linear(x, W), layer(x))
    dense_layer = Affine(dense(W).to(dtype), W.bias.to(dtype))
    eps = 1 / 127 if kind.startswith("int8") else torch.finfo(dtype).eps

    def close(ours, theirs):
        assert (ours - theirs).float().norm() <= 8 * eps * theirs.float().norm()

    close(linear(x, W), linear(x, dense_layer))
    slopes = torch.randn_like(linear(x, W))
    (gradient,) = torch.autograd.grad(linear(x, dense_layer), x, slopes)
    close(torch.autograd.grad(linear(x, W), x, slopes)[0], gradient)
    point = x.detach()
    close(torch.func.vjp(lambda x: linear(x, W), point)[1](slopes)[0], gradient)
    of_each = torch.vmap(lambda x, s: torch.func.vjp(lambda x: linear(x, W), x)[1](s)[0])
    close(of_each(point, slopes), gradient)
    close(
        torch.func.jvp(lambda x: linear(x, W), (point,), (point,))[1],
        torch.func.jvp(lambda x: linear(x, dense_layer), (point,), (point,))[1],
    )


@pytest.mark.gpu
@EACH_VARIANT
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8, outliers"])
def test_every_variant_on_a_gpu(case, kind):
    model, start, batch = make_adapter(case, kind)
    model.cuda()
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    start = {
        key: leaf.detach().cuda().requires_grad_(leaf.requires_grad) for key, leaf in start.items()
    }
    if case.start == "exact":
        # bitsandbytes itself cannot run an 8-bit layer that was quantised elsewhere and then moved
        assert torch.equal(lf.fcall(model, start, batch), lf.fcall(model, {}, batch))
    params = scramble(start)
    limit = 0.25 if kind.startswith("int8") else 1e-3
    expected = gradients(dequantised(model), params, batch)
    assert_gradients(model, params, batch, lambda found: near(found, expected, limit))
    losses = lf.vcall(model, lf.stack([params, params]), batch)
    same(losses, lf.fcall(model, params, batch).expand(2), rtol=limit)
    detached = {key: leaf.detach() for key, leaf in lf.stack([params, params]).items()}
    of_all = torch.vmap(torch.func.grad(lf.fcall, argnums=1), OVER_ADAPTERS)(model, detached, batch)
    near({key: of_all[key][0] for key in expected}, expected, limit)
