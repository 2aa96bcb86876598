"""Adapters of every case on models of several families."""

from dataclasses import replace
from zlib import crc32

import pytest
import torch

import lora_func as lf
from tests.support.cases import CASES
from tests.support.models import MODELS, batch_for, make, scramble


def families(case):
    """The families that fit a case: Qwen3 has no biases, BERT and GPT-2 have one in every layer."""
    return [family for family in MODELS if case.bias is not True or family != "qwen3"]


ADAPTERS = [case for case in CASES if case.is_adapter]


def one_family(case):
    """One family per case, in turn; LoRA runs on all families to test their differences."""
    fitting = families(case)
    return fitting[crc32(case.name.encode()) % len(fitting)]


PAIRS = [(case, one_family(case)) for case in ADAPTERS]


def each_pair(wanted=lambda case: True):
    pairs = [(case, family) for case, family in PAIRS if wanted(case)]
    pairs += [(LORA, family) for family in MODELS if (LORA, family) not in pairs and wanted(LORA)]
    return pytest.mark.parametrize(("case", "family"), pairs, ids=str)


LORA = next(case for case in CASES if case.name == "lora")


def adapter(case, model, seed=0, **settings):
    """A case's adapter on every linear layer of a model."""
    batches = [batch_for(model, seed=seed) for seed in (5, 6)]
    data = {
        None: None,
        "inputs": batches,
        "gradients": batches,
        "pairs": [(batches[0], batches[1])],
    }[case.data]
    _, _, r = case.fit(32, 32, 2)
    cfg = case.config(r)
    if case.data == "pairs":  # the input of BERT's pooler has no token axis
        cfg = replace(cfg, layers=(0, 1))
    return lf.init(model, cfg, seed=seed, data=data, **settings)


def moved(case, family, dtype):
    """A model, an adapter with perturbed leaves, and a batch."""
    model = make(family, dtype).requires_grad_(False)
    wide = torch.promote_types(dtype, torch.float32)
    return model, scramble(adapter(case, model, dtype=wide)), batch_for(model)


def close(ours, theirs, dtype=torch.float32):
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
