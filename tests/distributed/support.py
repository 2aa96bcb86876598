"""Models, adapters and comparisons for cases that run on several ranks."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import lora_func as lf
from lora_func.adapter import parse
from tests.support.models import qwen3

SITES = r"(q|v|up|down)_proj$"
LORA = lf.LoRA(r=2, target_modules=SITES)


def model(**settings):
    torch.manual_seed(0)
    return qwen3(**settings).requires_grad_(False)


def sharded(frozen=True, **options):
    """The same model, of which FSDP2 shards each layer and the rest."""
    base = model().requires_grad_(not frozen)
    for layer in base.model.layers:
        fully_shard(layer, **options)
    return fully_shard(base, **options)


def batch(rows=4):
    ids = torch.randint(0, 64, (rows, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def scrambled(params, seed=1):
    """The adapter with random trained leaves."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: leaf
        if parse(key).is_constant
        else (leaf.detach() + 0.05 * torch.randn(leaf.shape, generator=generator)).requires_grad_()
        for key, leaf in params.items()
    }


def adapter(cfg=LORA, seed=1):
    return scrambled(lf.init(model(), cfg, seed=seed), seed)


def gradients(params, loss):
    trained = {key: leaf for key, leaf in params.items() if leaf.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, [*trained.values()]), strict=True))


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def refused(error, message, function):
    """Check that a function refuses, on every rank, with a message."""
    with pytest.raises(error, match=message):
        function()


rank = dist.get_rank
