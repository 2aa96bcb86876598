"""Every variant on real architectures: initialization, merged model, transforms, training."""

import pytest
import torch

import lora_func as lf
from lora_func.variants import all_variants
from tests.support.models import MODELS, batch_for, make, merged, scramble
from tests.support.pairs import ADAPTERS, adapter, each_pair, families

EACH_MODEL = pytest.mark.parametrize("family", MODELS)
OVER_ADAPTERS = (None, 0, None)


@each_pair(lambda case: case.start != "elsewhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_start_is_the_base_model_bit_for_bit(case, family, dtype):
    model = make(family, dtype).requires_grad_(False)
    batch, params = batch_for(model), adapter(case, model)
    frozen = model(**batch)
    with lf.adapted(model, params):
        found = model(**batch)
    if case.start == "exact":
        assert torch.equal(found.logits, frozen.logits)
    else:
        size = frozen.logits.abs().max()
        error = (found.logits - frozen.logits).abs().max()
        assert error <= 64 * torch.finfo(dtype).eps * size
    assert found.logits.dtype == dtype


@each_pair(lambda case: case.has_weight)
def test_equals_the_merged_model(case, family):
    """Steering variants that are not linear in x have no merged weight and are skipped."""
    model = make(family, torch.float64).requires_grad_(False)
    params = scramble(adapter(case, model, dtype=torch.float64))
    batch = batch_for(model)
    torch.testing.assert_close(
        lf.fcall(model, params, batch), merged(model, params)(**batch).loss, rtol=1e-9, atol=1e-9
    )


@each_pair()
def test_transforms_agree(case, family):
    """The models return the loss in float32, whatever their dtype."""
    model = make(family, torch.float64).requires_grad_(False)
    batch = batch_for(model)
    adapters = [scramble(adapter(case, model, dtype=torch.float64), seed) for seed in range(2)]
    loop = torch.stack([lf.fcall(model, one, batch) for one in adapters])
    trained, _ = lf.partition(adapters[0])
    gradients = dict(zip(trained, torch.autograd.grad(loop[0], [*trained.values()]), strict=True))

    functional = torch.func.grad(lf.fcall, argnums=1)(model, adapters[0], batch)
    for key, gradient in gradients.items():
        assert gradient.isfinite().all(), key
        torch.testing.assert_close(functional[key], gradient, msg=key)

    stacked = {key: leaf.detach() for key, leaf in lf.stack(adapters).items()}
    torch.testing.assert_close(torch.vmap(lf.fcall, OVER_ADAPTERS)(model, stacked, batch), loop)
    of_all = torch.vmap(torch.func.grad(lf.fcall, argnums=1), OVER_ADAPTERS)(model, stacked, batch)
    for key, gradient in gradients.items():
        torch.testing.assert_close(of_all[key][0], gradient, msg=key)

    point = {key: leaf.detach() for key, leaf in trained.items()}
    tangents = {key: torch.randn_like(leaf) for key, leaf in point.items()}
    _, slope = torch.func.jvp(
        lambda leaves: lf.fcall(model, adapters[0] | leaves, batch), (point,), (tangents,)
    )
    expected = sum((gradients[key] * tangents[key]).sum() for key in tangents)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@each_pair()
def test_on_a_gpu(case, family):
    """The loss equals the CPU's, and the initial output equals the base model's."""
    model = make(family, torch.float64).requires_grad_(False)
    batch = batch_for(model)
    start = adapter(case, model, dtype=torch.float64)
    params = scramble({key: leaf.detach().clone() for key, leaf in start.items()})
    loss = lf.fcall(model, params, batch)
    model.cuda()
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    start, there = ({k: leaf.cuda() for k, leaf in p.items()} for p in (start, params))
    torch.testing.assert_close(lf.fcall(model, there, batch).cpu(), loss)
    if case.start == "exact":
        model.bfloat16()
        assert torch.equal(lf.fcall(model, start, batch), model(**batch).loss)


@pytest.mark.parametrize("case", ADAPTERS, ids=repr)
def test_trains_on_a_bfloat16_model(case):
    model = make(families(case)[0], torch.bfloat16).requires_grad_(False)
    batch, params = batch_for(model), adapter(case, model)
    trained, _ = lf.partition(params)
    start = {key: leaf.detach().clone() for key, leaf in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = lf.fcall(model, params, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(leaf.isfinite().all() for leaf in trained.values())
    frozen = [key for key, leaf in trained.items() if torch.equal(leaf, start[key])]
    assert not frozen
    assert losses[-1] < losses[0], losses


def test_every_variant_runs_as_a_stack():
    """vcall runs the others with torch.vmap, which is slower."""
    ours = [v for v in all_variants() if v.init.__module__.startswith("lora_func.")]
    assert {variant.name for variant in ours if not variant.stacks} == {"full"}


JOINED = [variant for variant in all_variants() if variant.join]


@pytest.mark.parametrize("variant", JOINED, ids=[variant.name for variant in JOINED])
def test_joined_statistics_are_those_of_all_data(variant):
    generator = torch.Generator().manual_seed(0)
    trials = sorted(variant.trials.values(), key=lambda trial: trial.data)
    cfg = variant.config(**trials[-1].settings)
    pairs = (2,) if variant.config is lf.SSteer else ()
    batches = [
        (torch.randn(*pairs, n, 6, generator=generator), torch.randn(n, 5, generator=generator))
        for n in (4, 7)
    ]
    first, second = (variant.observe(cfg, None, *batch) for batch in batches)
    joined = variant.join(first, second)
    after = variant.observe(cfg, variant.observe(cfg, None, *batches[0]), *batches[1])
    torch.testing.assert_close(joined, after)
