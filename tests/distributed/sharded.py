"""A base that FSDP2 shards: every way to call it, starts, files, merging."""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lora_func as lf
from tests.distributed.support import (
    LORA,
    SITES,
    adapter,
    batch,
    close,
    gradients,
    model,
    rank,
    refused,
    scrambled,
    sharded,
)

CONFIGS = [
    lf.LoRA(r=2, target_modules=SITES),
    lf.PiSSA(r=2, target_modules=SITES),
    lf.DoRA(r=2, target_modules=SITES),
    lf.DeLoRA(r=2, target_modules=SITES),
    lf.VeRA(r=4, target_modules=SITES),
    lf.IA3(target_modules=SITES),
    lf.IA3FF(target_modules=SITES),
    lf.ROAD(group_size=8, target_modules=SITES),
    lf.HRA(r=2, target_modules=SITES),
    lf.OFT(block_size=8, target_modules=SITES),
    lf.OFT(block_size=8, neumann_terms=5, target_modules=SITES),
    lf.SHiRA(r=1, target_modules=SITES),
    lf.SSVD(r=4, target_modules=SITES),
    lf.AntiPaSTO(r=4, block_size=2, target_modules=SITES),
    lf.SSteer(r=4, target_modules=SITES),
    lf.BitFit(target_modules=SITES, allow_new_bias=True),
    lf.LoRA(r=2, target_modules="embed_tokens"),
    lf.Full(target_parameters=(r"0\.mlp\.up_proj\.weight", r"1\.input_layernorm\.weight")),
]


def case_every_variant_by_fcall_and_vcall():
    base, spread, data = model(), sharded(), batch()
    for cfg in CONFIGS:
        params = adapter(cfg)
        expected = gradients(params, lf.fcall(base, params, data))
        close(gradients(params, lf.fcall(spread, params, data)), expected)
        stack = lf.stack([params, adapter(cfg, 2), adapter(cfg, 3)])
        close(lf.vcall(spread, stack, data, chunk=2), lf.vcall(base, stack, data))
        close(spread(**data).loss, base(**data).loss)


def case_transforms():
    base, spread, data = model(), sharded(), batch()
    for cfg in (LORA, CONFIGS[2], CONFIGS[-1]):
        point = {key: leaf.detach() for key, leaf in adapter(cfg).items()}
        direction = {key: torch.ones_like(leaf) for key, leaf in point.items()}

        def values(m, point=point, direction=direction):
            def loss(params):
                return lf.fcall(m, params, data)

            stack = lf.stack([point, point])
            return (
                torch.func.grad(loss)(point),
                torch.func.jvp(loss, (point,), (direction,)),
                torch.vmap(loss)(stack),
                torch.vmap(torch.func.grad(loss))(stack),
            )

        close(values(spread), values(base), 1e-4)


def case_checkpointing_and_compiled_blocks():
    base, data, params = model(), batch(), adapter()
    expected = gradients(params, lf.fcall(base, params, data))
    spread = sharded().train()
    spread.gradient_checkpointing_enable({"use_reentrant": False})
    close(gradients(params, lf.fcall(spread, params, data)), expected)
    compiled = model()
    for layer in compiled.model.layers:
        layer.compile(backend="eager")
        fully_shard(layer)
    close(gradients(params, lf.fcall(fully_shard(compiled), params, data)), expected)


def case_half_precision_policies():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    spread, data, base = sharded(mp_policy=policy), batch(), model().bfloat16()
    for cfg in (LORA, CONFIGS[2], CONFIGS[-1]):
        params = adapter(cfg)
        loss, expected = lf.fcall(spread, params, data), lf.fcall(base, params, data)
        close(loss.float(), expected.float(), 3e-2)
        found, expected = gradients(params, loss), gradients(params, expected)
        assert all(
            (found[key] - expected[key]).norm() < 0.1 * expected[key].norm() for key in found
        )


def case_a_base_that_is_not_frozen_is_refused():
    spread, params = sharded(frozen=False), adapter()
    refused(ValueError, "requires grad; freeze", lambda: lf.fcall(spread, params, batch()))
    assert all(parameter.requires_grad for parameter in spread.parameters())


def case_starts_are_those_of_one_process_and_gather_only_what_they_need():
    base, spread = model(), sharded()
    for cfg in CONFIGS:
        found, expected = lf.init(spread, cfg), lf.init(base, cfg)
        assert not any(hasattr(leaf, "full_tensor") for leaf in found.values())
        close({k: v.abs() for k, v in found.items()}, {k: v.abs() for k, v in expected.items()})
    whole = torch.distributed.tensor.DTensor.full_tensor
    try:
        torch.distributed.tensor.DTensor.full_tensor = None  # shapes alone are needed
        lf.init(sharded(), LORA)
    finally:
        torch.distributed.tensor.DTensor.full_tensor = whole


def case_files_merging_and_exports():
    base, spread, data, params = model(), sharded(), batch(), adapter(CONFIGS[2])
    folder = [tempfile.mkdtemp() if rank() == 0 else None]
    dist.broadcast_object_list(folder)
    file = Path(folder[0]) / "adapter.safetensors"
    lf.save(params, file, model=spread)
    dist.barrier()
    close(lf.load(file, model=spread), params, 0)
    close(lf.load(file, model=base), params, 0)
    close(lf.merge(spread, params), lf.merge(base, params))
    on_one = lf.merge(spread, params, ranks=0)
    assert len(on_one) == (0 if rank() else len(lf.merge(base, params)))
    assert str(lf.summary(params, spread)) == str(lf.summary(params, base))
    near, expected = (lf.to_lora(params, m, 4, tol=1.0).params for m in (spread, base))
    close(lf.fcall(base, near, data), lf.fcall(base, expected, data), 1e-4)
    lf.peft.to_peft(params, Path(folder[0]) / str(rank()), model=spread)
    close(lf.peft.from_peft(Path(folder[0]) / str(rank()), base), params, 0)
    assert os.path.exists(file)


def case_an_attached_model_that_is_then_sharded():
    base, data = model(), batch()
    params = {key: leaf.detach() for key, leaf in adapter().items()}
    expected = lf.fcall(base, params, data)
    handle = lf.attach(base, params)
    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(base)
    close(base(**data).loss, expected)
    close(handle.params(), params, 0)


def case_ranks_with_different_numbers_of_adapters():
    base, spread, data = model(), sharded(), batch()
    each = [adapter(seed=seed) for seed in range(5)]
    mine = each if rank() == 0 else each[:1]
    expected = [lf.fcall(base, params, data) for params in mine]
    close(lf.vcall(spread, lf.stack(mine), data), torch.stack(expected))
    losses = lf.vcall(spread, lf.stack(mine), data, chunk=2)
    found = gradients(mine[0], losses.sum())
    close(found, gradients(mine[0], lf.fcall(base, mine[0], data)))


def case_ranks_that_adapt_down_to_different_layers_are_refused():
    spread, data = sharded(), batch()
    above = adapter(lf.LoRA(r=2, target_modules=r"layers\.1\.mlp\.up_proj$"))
    mine = above if rank() else adapter()
    for run in (
        lambda: lf.fcall(spread, mine, data),
        lambda: lf.vcall(spread, lf.stack([mine]), data),
        lambda: lf.adapted(spread, mine).__enter__(),
    ):
        refused(ValueError, "the lowest adapted layer is not the same on all ranks", run)
    expected = gradients(above, lf.fcall(model(), above, data))
    close(gradients(above, lf.fcall(spread, above, data)), expected)


def case_a_rank_that_does_not_ask_for_the_check_takes_part_in_it():
    base, spread, data = model(), sharded(), batch()
    stack = lf.stack([adapter(seed=seed) for seed in range(2)])
    found = lf.vcall(spread, stack, data, check="never" if rank() else "first")
    close(found, lf.vcall(base, stack, data))


def case_what_a_sharded_base_refuses():
    spread, params = sharded(), adapter()
    refused(TypeError, "is spread over devices; attach", lambda: lf.attach(spread, params))
    mine = [params] * rank()
    kind, message = ((ValueError, "no adapter"), (RuntimeError, "another rank refused"))[rank()]
    refused(kind, message, lambda: lf.vcall(spread, mine, batch()))


def case_passes_for_other_ranks_draw_no_random_numbers():
    base, spread, data = model().train(), sharded().train(), batch()
    dropped = adapter(lf.LoRA(r=2, dropout=0.1, target_modules=SITES))
    after = []
    for each in (base, spread):
        torch.manual_seed(0)
        lf.vcall(each, lf.stack([dropped] * (1 + rank())), data, chunk=1, check="never")
        after.append(torch.rand(3))
    close(*after, 0)


def case_adapted_generates():
    base, spread, ids = model(use_cache=True), sharded(), batch()["input_ids"]
    params = scrambled(lf.init(base, LORA))
    with lf.adapted(base, params), torch.no_grad():
        expected = base(input_ids=ids).logits
    with lf.adapted(spread, params), torch.no_grad():
        close(spread(input_ids=ids).logits, expected)
