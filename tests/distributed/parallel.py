"""Tensor-parallel layers: linear layers whose weights are DTensors while they run."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

import lora_func as lf
from tests.distributed.sharded import CONFIGS
from tests.distributed.support import SITES, adapter, batch, close, gradients, model, refused

PLAN = {
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}


def parallel():
    base, mesh = model(), init_device_mesh("cpu", (2,))
    for layer in base.model.layers:
        parallelize_module(layer, mesh, PLAN)
    return base


def case_every_linear_variant():
    base, spread, data = model(), parallel(), batch()
    for cfg in CONFIGS[:-2]:
        params = adapter(cfg)
        expected = gradients(params, lf.fcall(base, params, data))
        close(gradients(params, lf.fcall(spread, params, data)), expected, 1e-4)


def case_sweeps():
    base, spread, data = model(), parallel(), batch()
    stack = lf.stack([adapter(seed=seed) for seed in range(3)])
    close(lf.vcall(spread, stack, data), lf.vcall(base, stack, data))


def case_what_parallel_layers_refuse():
    spread, data, params = parallel(), batch(), adapter()
    dropped = adapter(lf.LoRA(r=2, dropout=0.1, target_modules=SITES))
    refused(TypeError, "has dropout", lambda: lf.fcall(spread.train(), dropped, data))
    spread.eval()
    full = adapter(lf.Full(target_parameters=(r"0\.mlp\.up_proj\.weight",)))
    refused(TypeError, "tensor parallel here", lambda: lf.fcall(spread, full, data))
    gradient = torch.func.grad(lambda p: lf.fcall(spread, p, data))
    refused(RuntimeError, "tensor parallelism", lambda: gradient(params))
    expected = lf.fcall(model(), dropped, data)
    close(lf.fcall(spread, dropped, data), expected)


def case_the_plan_of_transformers():
    base, spread, data = model(), model(), batch()
    kinds = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    names = {f"model.layers.{i}.mlp.{n}": kind for i in range(2) for n, kind in kinds.items()}
    plan = names | {f"{name}.weight": kind for name, kind in names.items()}
    apply_tensor_parallelism(spread, init_device_mesh("cpu", (2,)), plan)
    forwards = [spread.get_submodule(name).forward for name in names]
    for cfg in CONFIGS[:-2]:
        params = adapter(cfg)
        expected = gradients(params, lf.fcall(base, params, data))
        close(gradients(params, lf.fcall(spread, params, data)), expected, 1e-4)
        with torch.no_grad():
            close(lf.fcall(spread, params, data), lf.fcall(base, params, data))
    params = adapter()
    with torch.no_grad(), lf.adapted(spread, params), lf.adapted(base, params):
        close(spread(**data).logits, base(**data).logits)
    close(spread(**data).logits, base(**data).logits)
    assert [spread.get_submodule(name).forward for name in names] == forwards
