"""fcall on Hugging Face models equals the merged model and PEFT, under every transform."""

import copy

import peft
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

import lora_func as lf
from lora_func.adapter import group
from tests.support.models import MODELS, batch_for, make, merged, scramble
from tests.support.models import lora as adapter

EACH_MODEL = pytest.mark.parametrize("family", MODELS)
OVER_ADAPTERS = (None, 0, None)


def loss_and_gradients(model, params, batch):
    trained, _ = lf.partition(params)
    loss = lf.fcall(model, params, batch)
    return loss, dict(zip(trained, torch.autograd.grad(loss, [*trained.values()]), strict=True))


@EACH_MODEL
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_the_start_is_the_base_model_bit_for_bit(family, dtype):
    model = make(family, dtype)
    batch = batch_for(model)
    head = lf.Full(target_parameters=r"(norm|ln_1|LayerNorm)\.|(c_attn|q_proj|query)\.weight")
    leaf_dtype = torch.promote_types(dtype, torch.float32)
    for params in (lf.init(model, lf.LoRA()), lf.init(model, head, dtype=leaf_dtype)):
        expected, found = (
            model(**batch),
            lf.fcall(model, params, batch, loss_fn=lambda output, _: output),
        )
        assert torch.equal(found.logits, expected.logits)
        assert found.logits.dtype == dtype
        assert torch.equal(found.loss, expected.loss)


@EACH_MODEL
def test_equals_the_merged_model(family):
    model = make(family)
    batch, params = batch_for(model), adapter(model)
    expected = merged(model, params)(**batch)
    torch.testing.assert_close(lf.fcall(model, params, batch), expected.loss)
    with lf.adapted(model, params):
        torch.testing.assert_close(model(**batch).logits, expected.logits)


@EACH_MODEL
def test_equals_peft(family):
    model = make(family)
    batch, params = batch_for(model), adapter(model)
    loss, gradients = loss_and_gradients(model, params, batch)
    names = sorted({site for site, _ in group(params)})
    conv1d = family == "gpt2"
    config = peft.LoraConfig(r=3, lora_alpha=4.0, target_modules=names, fan_in_fan_out=conv1d)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    their_leaves = {}
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            site = name.removeprefix("base_model.model.").split(".lora_")[0]
            key = f"{site}.lora.{'A' if 'lora_A' in name else 'B'}"
            parameter.data.copy_(params[key].data)
            their_leaves[key] = parameter
    their_loss = theirs(**batch).loss
    their_loss.backward()
    assert their_leaves.keys() == gradients.keys()
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-5)
    for key, leaf in their_leaves.items():
        torch.testing.assert_close(gradients[key], leaf.grad, rtol=1e-5, atol=1e-5, msg=key)


@EACH_MODEL
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transforms_agree_with_autograd_and_the_loop(family, attention):
    model = make(family, attn_implementation=attention)
    batch = batch_for(model)
    adapters = [adapter(model, seed=seed) for seed in range(3)]
    trained, constants = lf.partition(adapters[0])
    _, gradients = loss_and_gradients(model, adapters[0], batch)

    functional = torch.func.grad(lf.fcall, argnums=1)(model, adapters[0], batch)
    assert functional.keys() == adapters[0].keys()
    for key, gradient in functional.items():
        torch.testing.assert_close(gradient, gradients.get(key, torch.zeros(())), msg=key)

    stacked = lf.stack(adapters)
    loop = torch.stack([lf.fcall(model, one, batch) for one in adapters])
    torch.testing.assert_close(torch.vmap(lf.fcall, OVER_ADAPTERS)(model, stacked, batch), loop)

    of_all = torch.vmap(torch.func.grad(lf.fcall, argnums=1), OVER_ADAPTERS)(model, stacked, batch)
    for i, one in enumerate(adapters):
        for key, gradient in loss_and_gradients(model, one, batch)[1].items():
            torch.testing.assert_close(of_all[key][i], gradient, msg=key)

    def of_trained(leaves):
        return lf.fcall(model, leaves | constants, batch)

    point = {key: leaf.detach() for key, leaf in trained.items()}
    tangent = {key: torch.randn_like(leaf) for key, leaf in point.items()}
    _, slope = torch.func.jvp(of_trained, (point,), (tangent,))
    torch.testing.assert_close(slope, sum((gradients[k] * tangent[k]).sum() for k in point))

    def slope_at(leaves):
        return sum(
            (g * tangent[key]).sum() for key, g in torch.func.grad(of_trained)(leaves).items()
        )

    _, forward_over_reverse = torch.func.jvp(torch.func.grad(of_trained), (point,), (tangent,))
    reverse_over_reverse = torch.func.grad(slope_at)(point)
    for key, curvature in forward_over_reverse.items():
        assert curvature.any(), key
        torch.testing.assert_close(curvature, reverse_over_reverse[key], rtol=1e-3, atol=1e-4)


@EACH_MODEL
def test_vmap_with_a_batch_and_a_padding_mask_for_each_adapter(family):
    model = make(family)
    adapters = [adapter(model, seed=seed) for seed in range(2)]
    batches = [batch_for(model, seed=seed) for seed in range(2)]
    batches[1]["attention_mask"] = batches[1]["attention_mask"].flip(0)
    together = {key: torch.stack([batch[key] for batch in batches]) for key in batches[0]}
    losses = torch.vmap(lf.fcall, (None, 0, 0))(model, lf.stack(adapters), together)
    loop = [lf.fcall(model, *pair) for pair in zip(adapters, batches, strict=True)]
    torch.testing.assert_close(losses, torch.stack(loop))


@EACH_MODEL
def test_mixed_ranks_in_one_stack_equal_the_loop(family):
    model = make(family)
    batch = batch_for(model)
    adapters = [adapter(model, seed=r, r=r, alpha=r + 1.0) for r in (1, 4, 2)]
    stacked = lf.stack(adapters)
    losses = torch.vmap(lf.fcall, OVER_ADAPTERS)(model, stacked, batch)
    loop = torch.stack([lf.fcall(model, one, batch) for one in adapters])
    torch.testing.assert_close(losses, loop, rtol=1e-6, atol=1e-6)
    trained = [leaf for one in adapters for leaf in lf.partition(one)[0].values()]
    for ours, solo in zip(
        torch.autograd.grad(losses.sum(), trained),
        torch.autograd.grad(loop.sum(), trained),
        strict=True,
    ):
        torch.testing.assert_close(ours, solo, rtol=1e-5, atol=1e-6)


@EACH_MODEL
def test_one_graph_for_all_adapters(family):
    model = make(family)
    batch = batch_for(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lf.fcall, fullgraph=True, backend=counter)
    for seed, alpha in enumerate((4.0, 5.0, 0.3)):
        params = adapter(model, seed=seed, alpha=alpha)
        loss, gradients = loss_and_gradients(model, params, batch)
        ours = compiled(model, params, batch)
        torch.testing.assert_close(ours, loss)
        trained = lf.partition(params)[0]
        for key, gradient in zip(
            trained, torch.autograd.grad(ours, [*trained.values()]), strict=True
        ):
            torch.testing.assert_close(gradient, gradients[key], msg=key)
    assert counter.frame_count == 1
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_compiled_transforms():
    model = make("qwen3")
    batch = batch_for(model)
    adapters = [
        {key: leaf.detach() for key, leaf in adapter(model, seed=seed).items()} for seed in range(2)
    ]
    torch._dynamo.reset()
    gradient = torch.func.grad(lf.fcall, argnums=1)
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")(
        model, adapters[0], batch
    )
    for key, expected in gradient(model, adapters[0], batch).items():
        torch.testing.assert_close(compiled[key], expected, msg=key)
    over = torch.vmap(gradient, OVER_ADAPTERS)
    stacked = lf.stack(adapters)
    with sdpa_kernel(SDPBackend.MATH):
        compiled = torch.compile(over, fullgraph=True, backend="aot_eager")(model, stacked, batch)
    for key, expected in over(model, stacked, batch).items():
        torch.testing.assert_close(compiled[key], expected, msg=key)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # hidden by torch, unless an error
def test_a_compiled_model_takes_plain_keys():
    model = make("bert")
    batch, params = batch_for(model), adapter(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(lf.fcall(compiled, params, batch), lf.fcall(model, params, batch))
    assert lf.init(compiled, lf.LoRA()).keys() == lf.init(model, lf.LoRA()).keys()


def test_autocast():
    model = make("bert")
    batch, params = batch_for(model), adapter(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model, params, batch)
        start = lf.init(model, lf.LoRA())
        assert torch.equal(lf.fcall(model, start, batch), model(**batch).loss)
    exact, _ = loss_and_gradients(model, params, batch)
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)
    assert all(
        gradient.dtype == torch.float32 and gradient.any() for gradient in gradients.values()
    )


DECODING = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "a static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@pytest.mark.parametrize("decoding", DECODING.values(), ids=DECODING)
def test_generate_equals_the_merged_model(family, decoding):
    model = make(family)
    params = adapter(model)
    ids = batch_for(model)["input_ids"]
    common = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    settings = {"use_cache": True, **common, **decoding}
    with lf.adapted(model, params):
        ours = model.generate(ids, **settings)
    assert torch.equal(ours, merged(model, params).generate(ids, **settings))


def test_the_sweep_step_equals_solo_training():
    model = make("gpt2")
    batch = batch_for(model)
    settings = [{"r": 2, "lr": 1e-2}, {"r": 4, "lr": 1e-3}]

    def start(i):
        return lf.init(model, lf.LoRA(r=settings[i]["r"]), seed=i)

    def optimizer_of(adapters):
        return torch.optim.AdamW(
            {"params": [*lf.partition(one)[0].values()], "lr": settings[i]["lr"]}
            for i, one in adapters.items()
        )

    together = {i: start(i) for i in range(2)}
    optimizer = optimizer_of(together)
    for _ in range(5):
        optimizer.zero_grad()
        losses = torch.vmap(lf.fcall, OVER_ADAPTERS)(model, lf.stack([*together.values()]), batch)
        losses.sum().backward()
        optimizer.step()
    for i, one in together.items():
        solo = start(i)
        optimizer = optimizer_of({i: solo})
        for _ in range(5):
            optimizer.zero_grad()
            lf.fcall(model, solo, batch).backward()
            optimizer.step()
        for key, leaf in solo.items():
            torch.testing.assert_close(one[key], leaf, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.gpu
@EACH_MODEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(family, dtype):
    model = make(family, dtype).cuda().requires_grad_(False)
    batch = {key: tensor.cuda() for key, tensor in batch_for(model).items()}
    assert torch.equal(lf.fcall(model, lf.init(model, lf.LoRA()), batch), model(**batch).loss)
    adapters = [scramble(lf.init(model, lf.LoRA(r=3), seed=seed), seed) for seed in range(2)]
    losses = torch.vmap(lf.fcall, OVER_ADAPTERS)(model, lf.stack(adapters), batch)
    loop = torch.stack([lf.fcall(model, one, batch) for one in adapters])
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(losses, loop, rtol=tolerance, atol=tolerance)
