"""Functions to compile, and the check that all adapters use one graph."""

import torch
from torch._dynamo.testing import CompileCounterWithBackend

import lora_func as lf
from tests.support.models import scramble

gradient = torch.func.grad(lf.fcall, argnums=1)
OVER_ADAPTERS = (None, 0, None)


FUNCTIONS = {
    "fcall": (lf.fcall, False),
    "grad": (gradient, False),
    "vmap of grad": (torch.vmap(gradient, OVER_ADAPTERS), True),
    "vcall": (lf.vcall, True),
}


def adapters(model, seed):
    made = [lf.init(model, lf.LoRA(r=2, alpha=4 + seed + i), seed=seed + i) for i in range(2)]
    return [{k: v.detach() for k, v in scramble(one, i).items()} for i, one in enumerate(made)]


def assert_one_graph(function, model, batch, inputs, backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for params in inputs:
        expected = function(model, params, batch)
        torch.testing.assert_close(compiled(model, params, batch), expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    assert all("forward" not in vars(module) for module in model.modules())
