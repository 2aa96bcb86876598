"""Torch's older engines around a base: DDP, FSDP1, and parameters as ZeRO-3 keeps them."""

import sys
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

import lora_func as lf
from tests.distributed.support import LORA, adapter, batch, close, gradients, model, refused


def case_ddp_says_that_it_does_not_average():
    base, data, params = model(), batch(), adapter()
    wrapped = DistributedDataParallel(model().requires_grad_(True))
    with pytest.warns(UserWarning, match="does not average the gradients of an adapter"):
        found = gradients(params, lf.fcall(wrapped, params, data))
    close(found, gradients(params, lf.fcall(base, params, data)))


def case_fsdp1_by_fcall_vcall_and_adapted():
    base, data, params = model(), batch(), adapter()
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={Qwen3DecoderLayer})
    spread = FullyShardedDataParallel(
        model(), auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    expected = gradients(params, lf.fcall(base, params, data))
    close(gradients(params, lf.fcall(spread, params, data)), expected)
    stack = lf.stack([params, adapter(seed=2)])
    close(lf.vcall(spread, stack, data), lf.vcall(base, stack, data))
    with torch.no_grad(), lf.adapted(spread, params), lf.adapted(base, params):
        close(spread(**data).logits, base(**data).logits)
    for read in (
        lambda: lf.init(spread, LORA),
        lambda: lf.merge(spread, params),
        lambda: lf.to_lora(params, spread, 2),
        lambda: lf.save(params, "unused", model=spread),
    ):
        refused(ValueError, "has flattened its weights; do this before", read)
    refused(
        RuntimeError,
        "FSDP1",
        lambda: torch.func.grad(lambda p: lf.fcall(spread, p, data))(params),
    )


def case_zero_3_refuses_transforms_and_gathers_starts():
    class Zero:
        """Stands for DeepSpeed: a parameter is empty, except inside GatheredParameters."""

        def __init__(self):
            self.kept = {}

        def partition(self, module):
            for i, parameter in enumerate(module.parameters()):
                parameter.ds_id = i
                self.kept[i] = parameter.data
                parameter.data = torch.empty(0)

        @contextmanager
        def GatheredParameters(self, parameters):  # noqa: N802 - DeepSpeed's name
            for parameter in parameters:
                parameter.data = self.kept[parameter.ds_id]
            yield
            for parameter in parameters:
                parameter.data = torch.empty(0)

    zero, data = Zero(), torch.ones(2, 4)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    expected = lf.init(base, lf.PiSSA(r=2))
    sys.modules["deepspeed"] = SimpleNamespace(zero=zero)
    zero.partition(base)
    close(lf.init(base, lf.PiSSA(r=2)), expected)
    refused(
        RuntimeError,
        "ZeRO-3",
        lambda: torch.func.grad(lambda p: lf.fcall(base, p, data).sum())(expected),
    )
    del sys.modules["deepspeed"]
    assert LORA.r == 2
