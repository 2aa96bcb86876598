"""Code that uses the library, as a type checker sees it: ``mypy --strict`` finds nothing here.

An ignored error that is none is an error of its own, so the wrong calls at the end are seen.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor, nn

import lora_func as lf
from lora_func import rules
from lora_func.peft import from_peft, to_peft
from lora_func.testing import Case, variant_tests


def mean_square(y: Tensor, batch: Any) -> Tensor:
    return y.square().mean()


def train(model: nn.Module, x: Tensor) -> lf.Params:
    cfg = lf.LoRA(r=4, target_modules=r"(q|v)_proj$", rank_pattern={"v_proj": 8})
    params = lf.init(model, [cfg, lf.Full(target_parameters="head")], seed=1)
    assert_type(params, dict[str, Tensor])
    trained, constants = lf.partition(params)
    assert_type(trained, dict[str, Tensor])
    optimizer = torch.optim.AdamW(rules.groups(params, rules.lora_plus(params, lr=1e-3, ratio=16)))
    loss = lf.fcall(model, params, x, loss_fn=mean_square)
    loss.backward()
    rules.assign(params, rules.riemannian(params, rules.gradients(params)))
    optimizer.step()
    return {**trained, **constants}


def sweep(model: nn.Module, members: Sequence[lf.Params], x: Tensor) -> lf.Params:
    losses = lf.vcall(model, members, x, loss_fn=mean_square, chunk=2)
    losses.sum().backward()
    lf.clip_grad_norm(members, 1.0)
    stacked = lf.stack(members)
    assert_type(lf.unstack(stacked), list[dict[str, Tensor]])
    return stacked


def keep(model: nn.Module, params: lf.Params, path: Path) -> lf.Params:
    lf.save(params, path, model=model, metadata={"note": "kept"})
    to_peft(params, path.with_suffix(""), model=model)
    assert_type(from_peft(path.with_suffix(""), model), dict[str, Tensor])
    with lf.attach(model, params) as handle:
        assert_type(handle, lf.Attached)
    with lf.adapted(model, params):
        model.eval()
    assert_type(lf.to_lora(params, model, 4), lf.AsLoRA)
    merged: Mapping[str, Tensor] = lf.merge(model, params)
    model.load_state_dict(merged)
    return lf.load(path, model=model)


def apply(W: lf.Weight, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return lf.linear(x, W) + params["g"]


def init(
    W: lf.Weight, cfg: lf.BitFit, generator: torch.Generator, stats: None = None
) -> dict[str, Tensor]:
    return {"g": torch.zeros(W.shape[0])}


VARIANT = lf.Variant(name="mine", config=lf.BitFit, init=init, apply=apply, leaves={"g": "d_out"})
test_mine = variant_tests([Case("mine", lambda r: lf.LoRA(r=r))])


def wrong(model: nn.Module, params: lf.Params) -> None:
    lf.LoRA(r="4")  # type: ignore[arg-type]
    lf.LoRA(rank=4)  # type: ignore[call-arg]
    lf.LoRA(start="zeros")  # type: ignore[arg-type]
    lf.init(params, lf.LoRA())  # type: ignore[arg-type]
    lf.save(model, "file")  # type: ignore[arg-type]
