"""Captured functions: trees, refusals and restored state on a CPU, and real graphs on a GPU."""

import importlib
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import lora_func as lf
from lora_func.graphs import _cuda
from tests.support.cases import CASES
from tests.support.families import FAMILIES
from tests.support.models import bert, qwen3

X = torch.arange(8.0).view(2, 4)


class ReplayedOnCPU:
    """Stands for a graph: it runs the function again, into the tensors of the first result."""

    def __init__(self, function):
        self.function, self.output = function, function()
        self.freed = False

    def replay(self):
        pairs = zip(tensors(self.output), tensors(self.function()), strict=True)
        for old, new in pairs:
            old.detach().copy_(new)

    def pool(self):
        return self

    def reset(self):
        self.freed = True


def tensors(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


recorded = []


@pytest.fixture
def on_cpu(monkeypatch):
    """Let ``capture`` take tensors on the CPU, with a stand-in for the graph."""

    def record(function, device, pool):
        recorded.append((device, pool))
        graph = ReplayedOnCPU(function)
        return graph, graph.output

    monkeypatch.setattr(_cuda, "GPU", "cpu")
    monkeypatch.setattr(_cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(_cuda, "aside", lambda device: torch.random.fork_rng(devices=[]))
    monkeypatch.setattr(_cuda, "record", record)


def test_a_call_copies_its_arguments_and_gives_new_results(on_cpu):
    example = {"a": torch.ones(2), "b": [torch.zeros(3), 5]}
    captured = lf.capture(lambda tree: {"sum": tree["a"] * tree["b"][1]}, example)
    first = captured({"a": torch.full((2,), 2.0), "b": [torch.zeros(3), 5]})
    second = captured({"a": torch.full((2,), 3.0), "b": [torch.zeros(3), 5]})
    assert first["sum"].tolist() == [10, 10]
    assert second["sum"].tolist() == [15, 15]
    assert example["a"].tolist() == [1, 1]


def test_results_may_be_the_graphs_own(on_cpu):
    captured = lf.capture(lambda x: x + 1, torch.zeros(2), copies=False)
    first = captured(torch.ones(2))
    assert captured(torch.zeros(2)) is not None
    assert first.tolist() == [1, 1]  # overwritten


def test_the_graphs_own_inputs_are_not_copied(on_cpu, monkeypatch):
    captured = lf.capture(lambda x, y: x + y, torch.zeros(2), torch.ones(2))
    counted = []
    arguments = importlib.import_module("lora_func.graphs._arguments")
    monkeypatch.setattr(arguments, "copy_all", lambda targets, sources: counted.append(targets))
    (x, y) = captured.inputs
    x.fill_(4)
    assert captured._arguments.fill((x, y)) is None
    assert captured._arguments.fill((x, torch.ones(2))) is None
    assert [len(targets) for targets in counted] == [0, 1]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (({"a": torch.ones(3)},), ValueError, r"argument 0\['a'\]: got shape \(3,\)"),
        (({"a": torch.ones(2).double()},), ValueError, "got dtype torch.float64, captured with"),
        (({"b": torch.ones(2)},), TypeError, r"argument 0\['a'\]: is missing; capture the"),
        (({"a": torch.ones(2)}, 1), TypeError, "argument 1: was not there at the capture"),
        (({"a": 1.0},), TypeError, r"argument 0\['a'\]: got 1.0, captured with a tensor"),
        (({"a": torch.ones(2, device="meta")},), TypeError, "is a tensor on meta; a CUDA graph"),
    ],
)
def test_other_arguments_are_refused(on_cpu, given, error, message):
    captured = lf.capture(lambda tree: tree["a"] * 2, {"a": torch.ones(2)})
    with pytest.raises(error, match=message):
        captured(*given)
    assert captured({"a": torch.ones(2)}).tolist() == [2, 2]


def test_the_order_of_keys_has_no_meaning_and_nan_is_nan(on_cpu):
    a, b = torch.ones(2), torch.full((2,), 5.0)
    captured = lf.capture(lambda tree, by: tree["a"] - tree["b"], {"a": a, "b": b}, math.nan)
    assert captured({"b": b, "a": a}, float("nan")).tolist() == [-4, -4]


def test_the_graphs_own_tensors_may_come_in_other_places(on_cpu):
    captured = lf.capture(lambda x, y: x - 2 * y, torch.zeros(2), torch.zeros(2))
    x, y = captured.inputs
    x.fill_(1)
    y.fill_(10)
    assert captured(y, x).tolist() == [8, 8]
    swap = lf.capture(lambda x, y: (y, x), torch.zeros(1), torch.zeros(1), copies=False)
    first = swap(torch.tensor([1.0]), torch.tensor([2.0]))
    assert [t.item() for t in swap(*first)] == [1, 2]


def test_what_is_no_tensor_is_held_for_good(on_cpu):
    model = nn.Linear(4, 4)
    captured = lf.capture(lambda module, x, by: module(x) * by, model, X, 2)
    torch.testing.assert_close(captured(model, X, 2), model(X) * 2)
    with pytest.raises(TypeError, match=r"argument 2: got 3, captured with 2, which the graph"):
        captured(model, X, 3)
    with pytest.raises(TypeError, match=r"argument 0: got .*, captured with"):
        captured(nn.Linear(4, 4), X, 2)
    with pytest.raises(TypeError, match=r"argument 2: got 2\.0, captured with 2"):
        captured(model, X, 2.0)


def test_what_may_hold_unseen_tensors_is_refused(on_cpu):
    with pytest.raises(TypeError, match="argument 1: got object, which may hold tensors"):
        lf.capture(lambda x, o: x, X, object())
    with pytest.raises(TypeError, match=r"result\['o'\]: is a object, which may hold tensors"):
        lf.capture(lambda x: {"x": x, "o": object()}, X)


@pytest.mark.parametrize(
    ("function", "operation", "why"),
    [
        (lambda x: x * x.sum().item(), "_local_scalar_dense", "looks at the value of a tensor"),
        (lambda x: x if x.sum() > 0 else -x, "_local_scalar_dense", "looks at the value"),
        (lambda x: x[x > 1], "index", "whose size depends on values, as indexing by a mask"),
        (lambda x: torch.linalg.inv(x @ x.mT), "_linalg_check_errors", "_ex functions do not"),
        (lambda x: x.to("meta"), "_to_copy", "works on cpu, meta at once"),
    ],
)
def test_what_waits_for_the_gpu_is_named(on_cpu, function, operation, why):
    here = rf"in {operation} \(.*test_graphs\.py:\d+\)"
    with pytest.raises(RuntimeError, match=rf"waits for the GPU {here}, which .*{why}"):
        lf.capture(function, X)


def test_sparse_experts_are_refused_by_name(on_cpu):
    model = FAMILIES["qwen3 moe"].make().requires_grad_(False)
    model.config._experts_implementation = "eager"
    params = lf.init(model, lf.LoRA(r=2, target_modules="q_proj"))
    batch = {"input_ids": torch.arange(6).view(1, 6)}
    with pytest.raises(RuntimeError, match=r"waits for the GPU in .*sparse experts"):
        lf.capture(lambda p: lf.fcall(model, p, batch).logits, params)


@pytest.mark.parametrize(
    "write", [lambda x: x.mul_(2), lambda x: x.data[0].add_(2)], ids=["itself", "a view"]
)
def test_a_function_that_writes_to_its_arguments_is_refused(on_cpu, write):
    with pytest.raises(RuntimeError, match=r"argument 0: the function writes to it"):
        lf.capture(write, X.clone())


def test_a_function_that_sets_the_gradients_of_its_arguments_is_refused(on_cpu):
    def step(x):
        x.grad = None
        x.square().sum().backward()

    with pytest.raises(RuntimeError, match=r"argument 0: the function sets its \.grad"):
        lf.capture(step, X.clone().requires_grad_())


def test_a_cache_that_is_made_in_the_first_run_stays(on_cpu):
    kept = {}

    def function(x):
        if "mask" not in kept:
            kept["mask"] = torch.ones(4, 4).tril_()
        return x @ kept["mask"]

    torch.testing.assert_close(lf.capture(function, X)(X), X @ torch.ones(4, 4).tril())


def test_statistics_that_an_operation_writes_undeclared_are_restored(on_cpu):
    norm, once = (nn.BatchNorm1d(4).train() for _ in range(2))
    lf.capture(norm, X)
    once(X)  # the stand-in for a graph runs once
    torch.testing.assert_close(norm.running_mean, once.running_mean)
    torch.testing.assert_close(norm.running_var, once.running_var)


def test_state_that_is_replaced_in_each_run_is_refused(on_cpu):
    state = {"sum": torch.zeros(2, 4)}

    def function(x):
        state["sum"] = state["sum"] + x
        return state["sum"]

    with pytest.raises(RuntimeError, match=r"keeps a tensor .* makes anew in each run"):
        lf.capture(function, X)
    average = {}

    def averaged(x):
        if "x" not in average:
            average["x"] = torch.zeros_like(x)
            average["x"].copy_(x)
        return average["x"].lerp_(x, 0.5)

    with pytest.raises(RuntimeError, match=r"keeps a tensor .* in its first run"):
        lf.capture(averaged, X)


def test_a_capture_inside_a_transform_is_refused():
    with pytest.raises(RuntimeError, match="put the transform into the function"):
        torch.func.grad(lambda x: lf.capture(lambda y: y, x).inputs[0].sum())(torch.ones(2))


def test_tensors_on_a_cpu_and_a_machine_without_a_gpu_are_refused():
    with pytest.raises(TypeError, match=r"argument 0\['x'\]: is a tensor on cpu; .*one GPU"):
        lf.capture(lambda tree: tree, {"x": X})
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="there is no GPU"):
            lf.capture(lambda: None)


def test_a_pool_is_shared_and_a_freed_graph_says_so(on_cpu):
    recorded.clear()
    first = lf.capture(lambda x: x, X)
    second = lf.capture(lambda x: x, X, pool=first)
    assert recorded[1] == (torch.device("cpu"), first._graph)
    first.free()
    first.free()
    assert first.inputs == ()
    for act in (lambda: first(X), lambda: lf.capture(lambda x: x, X, pool=first)):
        with pytest.raises(RuntimeError, match="this graph has been freed"):
            act()
    assert second(X) is not None


def parts(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2)).requires_grad_(False)
    return model, lf.init(model, lf.LoRA(r=2))


def train_step(model, params, optimizer):
    def step(batch):
        optimizer.zero_grad()
        loss = lf.fcall(model, params, batch, loss_fn=lambda y, _: (y - 1).square().mean())
        loss.backward()
        lf.clip_grad_norm(params, 1.0)
        optimizer.step()
        return loss

    return step


def adamw(params, **settings):
    return AdamW([p for p in params.values() if p.requires_grad], lr=0.1, **settings)


def test_what_the_runs_before_the_capture_wrote_is_restored(on_cpu, monkeypatch):
    # on a CPU the number of steps is not "capturable", and looks at its value
    monkeypatch.setitem(importlib.import_module("lora_func.graphs._watch")._WAITS, "none", "")
    monkeypatch.delitem(
        importlib.import_module("lora_func.graphs._watch")._WAITS, "_local_scalar_dense"
    )
    model, params = parts()
    optimizer = adamw(params, foreach=False)
    before, random_state = {k: v.detach().clone() for k, v in params.items()}, torch.get_rng_state()
    lf.capture(train_step(model, params, optimizer), X)
    # the stand-in for a graph computes while it is recorded: one step
    assert {state["step"].item() for state in optimizer.state.values()} == {1}
    other = parts()[1]
    torch.set_rng_state(random_state)
    assert all(torch.equal(other[key], before[key]) for key in before)
    train_step(model, other, adamw(other, foreach=False))(X)
    for key, leaf in params.items():
        torch.testing.assert_close(leaf, other[key])


def test_state_of_unknown_start_is_refused_and_state_that_is_there_is_not(on_cpu):
    model, params = parts()
    optimizer = SGD([p for p in params.values() if p.requires_grad], lr=0.1, momentum=0.9)
    step = train_step(model, params, optimizer)
    with pytest.raises(RuntimeError, match=r"keeps a tensor of shape .* call the function once"):
        lf.capture(step, X)
    step(X)
    lf.capture(step, X)


def test_gradients_that_add_up_are_refused(on_cpu):
    model, params = parts()

    def step(batch):
        lf.fcall(model, params, batch, loss_fn=lambda y, _: y.square().mean()).backward()

    with pytest.raises(RuntimeError, match="a gradient that adds up"):
        lf.capture(step, X)


def test_an_error_in_the_function_restores_what_it_wrote(on_cpu):
    state = torch.zeros(3)

    def function(x):
        state.add_(1)
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        lf.capture(function, X)
    assert state.tolist() == [0, 0, 0]


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_no_variant_waits_for_a_gpu(on_cpu, case):
    d_in, d_out, r = case.fit(6, 6, 2)
    model = nn.Linear(d_in, d_out, bias=case.bias is not False).requires_grad_(False)
    params = {k: v.detach() for k, v in case.params(model, r).items()}
    x = torch.randn(3, d_in)

    def loss(params, x):
        return lf.fcall(model, params, x, loss_fn=lambda y, _: y.square().mean())

    graph = lf.capture(torch.func.grad_and_value(loss), params, x)
    torch.testing.assert_close(graph(params, x), torch.func.grad_and_value(loss)(params, x))
    stack = lf.stack([params, params])
    swept = lf.capture(lambda s, x: lf.vcall(model, s, x, check="never"), stack, x)
    torch.testing.assert_close(swept(stack, x), lf.vcall(model, stack, x, check="never"))


@pytest.mark.parametrize("make", [qwen3, bert])
def test_transformers_does_not_look_into_masks_while_it_is_captured(on_cpu, make):
    model = make().requires_grad_(False).eval()
    params = lf.init(model, lf.LoRA(r=2))
    ids = torch.arange(12).view(2, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        graph = lf.capture(lambda p, b: lf.fcall(model, p, b)[0], params, batch)
        batch["attention_mask"][1, 4:] = 0
        torch.testing.assert_close(graph(params, batch), lf.fcall(model, params, batch)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_replay_on_a_gpu_is_a_call(case, dtype):
    d_in, d_out, r = case.fit(16, 16, 2)
    model = nn.Linear(d_in, d_out, bias=case.bias is not False).requires_grad_(False)
    params = {k: v.detach() for k, v in case.params(model, r).items()}
    model, params = model.to("cuda", dtype), {k: v.cuda() for k, v in params.items()}
    xs = torch.randn(3, 5, d_in, dtype=dtype, device="cuda")

    def loss(params, x):
        return lf.fcall(model, params, x, loss_fn=lambda y, _: y.float().square().mean())

    function = torch.func.grad_and_value(loss)
    near = dict.fromkeys(("rtol", "atol"), 1e-4 if dtype == torch.float32 else 2e-2)
    graph = lf.capture(function, params, xs[0])
    for x in xs:
        torch.testing.assert_close(graph(params, x), function(params, x), **near)
    stack = lf.stack([params, params])
    swept = lf.capture(lambda s, x: lf.vcall(model, s, x, check="never"), stack, xs[0])
    for x in xs:
        expected = lf.vcall(model, stack, x, check="never")
        torch.testing.assert_close(swept(stack, x), expected, **near)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable")
@pytest.mark.parametrize("sweep", [False, True])
def test_twenty_captured_steps_of_adamw_are_twenty_steps(sweep):
    model = qwen3().cuda().bfloat16().requires_grad_(False)
    each = [lf.init(model, lf.LoRA(r=2), seed=seed) for seed in range(2)]
    start = lf.stack(each) if sweep else each[0]
    ids = torch.randint(0, 64, (20, 2, 8), device="cuda")
    found = []
    for captured in (False, True):
        trained, constants = lf.partition(start)
        trained = {key: leaf.detach().clone().requires_grad_() for key, leaf in trained.items()}
        params = {**trained, **constants}
        optimizer = adamw(params, capturable=True)

        def step(ids, params=params, optimizer=optimizer):
            optimizer.zero_grad()
            batch = {"input_ids": ids, "labels": ids}
            loss = (lf.vcall if sweep else lf.fcall)(model, params, batch).sum()
            loss.backward()
            lf.clip_grad_norm(params, 1.0)
            optimizer.step()
            return loss.detach()

        if sweep:
            lf.vcall(model, params, {"input_ids": ids[0], "labels": ids[0]})  # checks the first one
        run = lf.capture(step, ids[0]) if captured else step
        found.append(([run(own) for own in ids], params))
    (losses, params), (others, same) = found
    torch.testing.assert_close(losses, others, rtol=2e-2, atol=2e-2)
    for key, leaf in params.items():
        torch.testing.assert_close(leaf, same[key], rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_replays_draw_new_dropout_and_refuse_another_shape():
    model = nn.Sequential(nn.Linear(8, 8)).cuda().requires_grad_(False).train()
    params = {k: v.detach() + 1 for k, v in lf.init(model, lf.LoRA(r=2)).items()}
    params["0.lora._dropout"] = torch.tensor(0.5, device="cuda")
    x = torch.ones(3, 8, device="cuda")
    graph = lf.capture(lambda params, x: lf.fcall(model, params, x), params, x)
    assert not torch.equal(graph(params, x), graph(params, x))
    with pytest.raises(ValueError, match=r"argument 1: got shape \(4, 8\), captured with \(3, 8\)"):
        graph(params, torch.ones(4, 8, device="cuda"))


@pytest.mark.gpu
def test_graphs_on_a_gpu_share_a_pool_and_free_it():
    model = nn.Sequential(nn.Linear(512, 512)).cuda().requires_grad_(False)
    params, x = lf.init(model, lf.LoRA(r=2)), torch.ones(4096, 512, device="cuda")

    def call(params, x):
        return lf.fcall(model, params, x).square().sum()

    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    first = lf.capture(call, params, x)
    alone = torch.cuda.memory_reserved()
    second = lf.capture(call, params, x, pool=first)
    torch.testing.assert_close(first(params, x), second(params, x))
    assert torch.cuda.memory_reserved() - alone < alone - before + 2**22
    for graph in (first, second):
        graph.free()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= alone


@pytest.mark.gpu
def test_what_waits_for_a_gpu_is_named():
    with pytest.raises(RuntimeError, match="waits for the GPU in _local_scalar_dense"):
        lf.capture(lambda x: x * x.sum().item(), torch.ones(3, device="cuda"))
