"""torch.compile: adapters of equal shapes use one graph, and results equal eager mode."""

import pytest
import torch

import lora_func as lf
from tests.support.compiled import FUNCTIONS, adapters, assert_one_graph
from tests.support.models import batch_for, make


@pytest.mark.slow
@pytest.mark.parametrize(("function", "stacked"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_one_graph_for_all_adapters_under_inductor(function, stacked):
    model = make("qwen3", num_hidden_layers=1).requires_grad_(False)
    inputs = [adapters(model, 0), adapters(model, 7)]
    inputs = [lf.stack(made) if stacked else made[0] for made in inputs]
    assert_one_graph(function, model, batch_for(model), inputs, "inductor")


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_vcall_of_other_models(family):
    """The compiler treats BERT's ``CrossEntropyLoss`` as one operation, so vcall raises."""
    model = make(family).requires_grad_(False)
    inputs, batch = [lf.stack(adapters(model, seed)) for seed in (0, 7)], batch_for(model)
    if family == "gpt2":
        assert_one_graph(lf.vcall, model, batch, inputs, "aot_eager")
        return
    torch._dynamo.reset()
    compiled = torch.compile(lf.vcall, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="over the rows of 2 adapters"):
        compiled(model, inputs[0], batch)
    inputs_alone = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert_one_graph(lf.vcall, model, inputs_alone, inputs, "aot_eager")


def test_the_gradients_of_a_compiled_sweep():
    model = make("gpt2").requires_grad_(False)
    batch, stacked = batch_for(model), lf.stack(adapters(model, 0))
    trained = {k: v.requires_grad_() for k, v in lf.partition(stacked)[0].items()}
    torch._dynamo.reset()
    compiled = torch.compile(lf.vcall, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        *(
            torch.autograd.grad(f(model, stacked, batch).sum(), [*trained.values()])
            for f in (compiled, lf.vcall)
        ),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
