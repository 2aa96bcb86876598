"""Effective weights: convolutions, embeddings, stacked experts, attention, tied weights."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import lora_func as lf
from lora_func.adapter import SHARED, group
from lora_func.variants import by_name
from lora_func.weights import Affine
from tests.support.cases import CASES, Made
from tests.support.models import TiedTwice, batch_for, make, scramble


class Experts(nn.Module):
    """Stacked expert weights, in the two layouts that transformers uses."""

    def __init__(self, is_transposed=False):
        super().__init__()
        shape = (3, 8, 12) if is_transposed else (3, 12, 8)
        self.up, self.is_transposed = nn.Parameter(torch.randn(shape)), is_transposed
        self.up_bias = nn.Parameter(torch.randn(3, 12))

    def forward(self, x):
        up = self.up if self.is_transposed else self.up.mT
        return torch.einsum("bd,edf->bef", x, up) + self.up_bias


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def tokens(n=4):
    return torch.randint(0, 16, (2, n))


# a model, its input, the site, and the name of its weight
PLACES = {
    "conv1d": (nn.Conv1d(4, 8, 2), torch.randn(2, 4, 5), {"target_modules": ""}, "weight"),
    "conv2d": (
        nn.Conv2d(4, 8, (2, 1), padding=1, stride=2, padding_mode="circular"),
        torch.randn(2, 4, 5, 6),
        {"target_modules": ""},
        "weight",
    ),
    "grouped": (
        nn.Conv2d(8, 8, 2, groups=2),
        torch.randn(2, 8, 4, 4),
        {"target_modules": ""},
        "weight",
    ),
    "embedding": (nn.Embedding(16, 8, padding_idx=0), tokens(), {"target_modules": ""}, "weight"),
    "experts": (
        Experts(),
        torch.randn(5, 8),
        {"target_modules": (), "target_parameters": "up$"},
        "up",
    ),
    "transposed experts": (
        Experts(is_transposed=True),
        torch.randn(5, 8),
        {"target_modules": (), "target_parameters": "up$"},
        "up",
    ),
    "attention's input": (
        Attention(),
        torch.randn(2, 3, 8),
        {"target_modules": (), "target_parameters": "in_proj_weight"},
        "attention.in_proj_weight",
    ),
    "attention's output": (
        Attention(),
        torch.randn(2, 3, 8),
        {"target_modules": "out_proj"},
        "attention.out_proj.weight",
    ),
    "a parameter": (
        nn.Sequential(Conv1D(12, 8)),
        torch.randn(3, 8),
        {"target_modules": (), "target_parameters": "weight"},
        "0.weight",
    ),
}
for model, *_ in PLACES.values():
    model.requires_grad_(False).double()
EACH_PLACE = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


def as_matrix(name, model, weight):
    if isinstance(model, (nn.Conv1d, nn.Conv2d)):
        return weight.flatten(1)
    transposed = isinstance(model, nn.Embedding) or getattr(model, "is_transposed", False)
    conv1d = name == "0.weight"
    return weight.mT if transposed or conv1d else weight


def with_new_weights(model, params, name):
    """The model's parameters with W and b replaced by W' and b', matrix by matrix."""
    parameters = dict(model.named_parameters())
    weight = parameters[name]
    W = as_matrix(name, model, weight)
    bias_name = name.removesuffix("weight") + "bias" if name.endswith("weight") else f"{name}_bias"
    bias = parameters.get(bias_name)
    ((_, variant_name), keys) = next(iter(group(params).items()))
    variant = by_name(variant_name)
    stacked = W.ndim == 3
    weights, biases = [], []
    for i in range(len(W) if stacked else 1):
        leaves = {
            leaf: params[key][i] if stacked and not key.startswith(SHARED) else params[key]
            for leaf, key in keys.items()
        }
        one = Affine(W[i] if stacked else W, bias[i] if stacked and bias is not None else bias)
        weights.append(variant.weight(one, leaves))
        biases.append(variant.bias(one.bias, leaves) if variant.bias else one.bias)
    new = torch.stack(weights) if stacked else weights[0]
    parameters[name] = as_matrix(name, model, new).reshape(weight.shape)
    if biases[0] is not None:
        parameters[bias_name] = torch.stack(biases) if stacked else biases[0]
    return parameters


NO_DATA = [case for case in CASES if not case.data and case.is_adapter and case.bias is not False]


def adapter(case, place, seed=0):
    model, _, where, _ = place
    _, _, r = case.fit(8, 8, 2)
    cfg = case.config(r)
    return lf.init(model, replace(cfg, **where), seed=seed, dtype=torch.float64)


@EACH_PLACE
@pytest.mark.parametrize("case", NO_DATA, ids=repr)
def test_the_adapted_module_runs_with_the_adapted_weight(case, place):
    model, x, _, name = place
    x = x.double() if x.is_floating_point() else x
    if case.bias and isinstance(model, nn.Embedding):
        with pytest.raises(ValueError, match="has no bias"):
            adapter(case, place)
        return
    params = adapter(case, place)
    if case.name in ("lora-bias", "loreft") and isinstance(model, nn.Embedding):
        with pytest.raises(TypeError, match="adds a bias, and its module has no place for one"):
            lf.fcall(model, params, x)
        return
    frozen = model(x)
    if case.start == "exact":
        with torch.no_grad():  # torch uses other kernels for weights that require grad
            assert torch.equal(lf.fcall(model, params, x), frozen)
    params = scramble(params)
    y = lf.fcall(model, params, x)
    expected = functional_call(model, with_new_weights(model, params, name), (x,))
    torch.testing.assert_close(y, expected)
    assert not torch.equal(y, frozen)
    trained = lf.partition(params)[0]
    ours, theirs = (
        torch.autograd.grad(z.square().sum(), [*trained.values()], allow_unused=True)
        for z in (y, expected)
    )
    torch.testing.assert_close(ours, theirs)
    if isinstance(model, nn.Embedding) or any(key.endswith("dora.A") for key in trained):
        return
    assert all(gradient is not None and gradient.any() for gradient in ours)


@EACH_PLACE
def test_vmap(place):
    case = next(case for case in CASES if case.name == "lora")
    model, x, *_ = place
    x = x.double() if x.is_floating_point() else x
    adapters = [scramble(adapter(case, place, seed), seed) for seed in range(2)]
    ours = torch.vmap(lf.fcall, (None, 0, None))(model, lf.stack(adapters), x)
    torch.testing.assert_close(ours, torch.stack([lf.fcall(model, one, x) for one in adapters]))


WEIGHT = {"target_modules": (), "target_parameters": "weight"}
WITH_NORM = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 2))
REFUSED = {
    "transposed convolution": (nn.ConvTranspose1d(4, 4, 3), lf.LoRA(r=2, **WEIGHT), "no matrix"),
    "vector": (nn.LayerNorm(4), lf.LoRA(r=2, **WEIGHT), "accepted are parameters of two or three"),
    "computed weight": (WITH_NORM, lf.LoRA(r=2, target_modules="0"), "computed when it is read"),
    "role": (
        nn.Conv1d(4, 4, 2),
        lf.LoRA(r=2, target_modules="0", target_roles="reader"),
        "Conv1d has no role; only linear layers have",
    ),
    "data": (nn.Conv1d(4, 4, 2), lf.EVA(r=2, target_modules="0"), "at the inputs of linear layers"),
}


@pytest.mark.parametrize(("module", "cfg", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_matrix_is_refused(module, cfg, message):
    data = [torch.ones(1, 4, 5)] if isinstance(cfg, lf.EVA) else None
    with pytest.raises(TypeError, match=f"0.*{message}"):
        lf.init(nn.Sequential(module), cfg, data=data)


def test_steering_that_is_no_weight_is_refused_at_the_call():
    model = nn.Sequential(nn.Conv1d(4, 4, 2))
    with pytest.raises(TypeError, match="0: ssteer_add is not linear in x and has no weight"):
        lf.fcall(model, {"0.ssteer_add.delta": torch.zeros(4)}, torch.ones(1, 4, 5))


def test_sparse_gradients_are_refused():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True))
    params = lf.init(model, lf.LoRA(r=2, target_modules="0"))
    with pytest.raises(TypeError, match="0: lora has no sparse gradients; set sparse=False"):
        lf.fcall(model, params, torch.arange(3))


def test_two_variants_that_both_write_a_bias_are_refused():
    model = Experts()
    bitfit = lf.BitFit(target_modules=(), target_parameters="^up$")
    params = lf.init(model, [bitfit, lf.Full(target_parameters="up_bias")])
    with pytest.raises(ValueError, match="adapted twice, by bitfit at 'up' and by full"):
        lf.fcall(model, params, torch.ones(2, 8))
    params = lf.init(
        model,
        [
            lf.LoRA(r=2, target_modules=(), target_parameters="^up$"),
            lf.Full(target_parameters="up_bias"),
        ],
    )
    lf.fcall(model, params, torch.ones(2, 8))
    params["up.lora.C"] = torch.ones(3, 1)
    with pytest.raises(lf.UnusedLeafError, match=r"^1 leaves.*'up\.lora\.C'"):
        lf.fcall(model, params, torch.ones(2, 8))


def test_a_parameter_may_have_the_name_of_a_leaf():
    model = nn.Module()
    model.B = nn.Parameter(torch.randn(6, 8))
    model.forward = lambda x: x @ model.B.T
    params = scramble(lf.init(model, lf.LoRA(r=2, target_modules=(), target_parameters="^B$")))
    A, B = params["B.lora.A"], params["B.lora.B"]
    expected = torch.ones(2, 8) @ (model.B + 2 * B @ A).T
    torch.testing.assert_close(lf.fcall(model, params, torch.ones(2, 8)), expected)


def test_the_base_gets_gradients_in_adapted_and_none_in_fcall():
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Flatten(), nn.Linear(4, 4))
    params = scramble(lf.init(model, lf.LoRA(r=2, target_modules=["0", "2"])))
    lf.fcall(model, params, torch.randn(2, 4, 1)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    with lf.adapted(model, params):
        model(torch.randn(2, 4, 1)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class Scaled(nn.Embedding):
    """Like Gemma's embedding, which also reads the dtype of its weight."""

    def forward(self, ids):
        return super().forward(ids) * torch.tensor(3.0).to(self.weight.dtype)


class Everything(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) @ self.weight.T + self.weight.sum()


class LastIsPadding(nn.Embedding):
    def forward(self, ids):
        return torch.nn.functional.embedding(ids, self.weight, padding_idx=-1)


class Projected(nn.Embedding):
    def __init__(self):
        super().__init__(20, 8)
        self.proj = nn.Parameter(torch.randn(8, 8))

    def forward(self, ids):
        return super().forward(ids) @ self.proj


TABLES = {
    "plain": nn.Embedding(1000, 8),
    "padded": nn.Embedding(1000, 8, padding_idx=1),
    "scaled": Scaled(1000, 8),
}
READ_WHOLE = {
    "read past its rows": Everything(20, 8, padding_idx=1),
    "its last row is padding": LastIsPadding(20, 8),
    "scaled gradient": nn.Embedding(20, 8, scale_grad_by_freq=True),
}
IDS = torch.tensor([[1, 7, 7], [1, 19, 0]])


def on_layer(module, name, start=False):
    case = next(case for case in CASES if case.name == name)
    module.double().requires_grad_(False)
    params = lf.init(module, replace(case.config(2), target_modules=""), dtype=torch.float64)
    return module, params if start else scramble(params)


@pytest.mark.parametrize("name", ["lora", "pissa", "ia3_ff", "road2", "dora"])
@pytest.mark.parametrize(
    "module", [*TABLES.values(), *READ_WHOLE.values()], ids=[*TABLES, *READ_WHOLE]
)
@pytest.mark.parametrize(
    "ids", [IDS, IDS[:, :0], IDS[0, 0], IDS.int()], ids=["ids", "none", "one", "int32"]
)
def test_an_embedding_has_the_rows_and_gradients_of_its_adapted_table(module, name, ids):
    model, params = on_layer(module, name)
    y = lf.fcall(model, params, (ids,))
    expected = functional_call(model, with_new_weights(model, params, "weight"), (ids,))
    torch.testing.assert_close(y, expected)
    trained = [*lf.partition(params)[0].values()]
    ours, theirs = (torch.autograd.grad(z.square().sum(), trained) for z in (y, expected))
    torch.testing.assert_close(ours, theirs)


LARGE = {
    **{name: (module, IDS) for name, module in TABLES.items()},
    "convolution": (nn.Conv2d(32, 32, 3), torch.randn(1, 32, 4, 4).double()),
}


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "ssteer"])
@pytest.mark.parametrize(("module", "x"), LARGE.values(), ids=LARGE)
def test_neither_the_adapted_weight_is_made_nor_a_gradient_of_its_size(module, x, name):
    model, params = on_layer(module, name)
    with Made(*model.parameters(), *params.values()) as made:
        lf.fcall(model, params, (x,)).sum().backward()
    assert max(made.sizes) < module.weight.numel()


@pytest.mark.parametrize("name", ["lora", "ia3", "road2", "dora"])
@pytest.mark.parametrize("of_x", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("of_weight", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_convolution_keeps_its_memory_format_and_its_bits(of_weight, of_x, name):
    conv, x = nn.Conv2d(8, 12, 3).to(memory_format=of_weight), torch.randn(2, 8, 7, 6).double()
    model, params = on_layer(conv, name, start=True)
    x = x.to(memory_format=of_x)
    with torch.no_grad():
        y, frozen = lf.fcall(model, params, x), model(x)
    assert torch.equal(y, frozen)
    assert y.stride() == frozen.stride()


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_a_convolution_with_a_forward_of_its_own_reads_the_whole_weight(name):
    model, params = on_layer(Standardised(4, 8, 2), name)
    x = torch.randn(2, 4, 5, 6).double()
    expected = functional_call(model, with_new_weights(model, params, "weight"), (x,))
    torch.testing.assert_close(lf.fcall(model, params, x), expected)


def test_an_embedding_that_renorms_its_table_is_adapted_before():
    model, params = on_layer(nn.Embedding(20, 8, max_norm=1.0), "lora")
    before = model.weight.clone()
    found = lf.fcall(model, params, IDS).norm(dim=-1)
    assert (found <= 1 + 1e-6).all()
    assert (found > 0.99).any()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("compiled", [False, True])
def test_transforms_of_an_adapted_embedding(compiled):
    model, params = on_layer(TABLES["padded"], "lora")
    trained, constants = lf.partition(params)
    leaves = {key: leaf.detach() for key, leaf in trained.items()}

    def loss(leaves):
        return lf.fcall(model, {**leaves, **constants}, IDS).square().sum()

    grad = torch.func.grad(loss)
    expected = dict(
        zip(trained, torch.autograd.grad(loss(trained), [*trained.values()]), strict=True)
    )
    found = (torch.compile(grad, fullgraph=True, backend="aot_eager") if compiled else grad)(leaves)
    torch.testing.assert_close(found, expected)
    if compiled:
        return
    slope = torch.func.jvp(loss, (leaves,), (expected,))[1]
    torch.testing.assert_close(slope, sum(g.square().sum() for g in expected.values()))
    stacked = lf.stack([params, {k: v.detach() / 2 for k, v in params.items()}])
    batches = torch.stack([IDS, IDS.flip(0)])
    loop = [lf.fcall(model, *one) for one in zip(lf.unstack(stacked), batches, strict=True)]
    of_each = torch.vmap(lf.fcall, (None, 0, 0))(model, stacked, batches)
    torch.testing.assert_close(of_each, torch.stack(loop))
    torch.testing.assert_close(lf.vcall(model, stacked, batches, batched=True), of_each)


OPERATIONS = {
    "rows": lambda w, ids: w[ids],
    "slice": lambda w, ids: w[2:5],
    "scaled": lambda w, ids: 0.5 * w + w / 2 - (-w) ** 2,
    "compared": lambda w, ids: ((w > 0) == (w >= 0)).to(w.dtype),
    "looped": lambda w, ids: torch.stack([*w][: len(w) // 2]),
    "multiplied": lambda w, ids: (
        (w @ torch.ones(8, 3).to(w)) + torch.ones(3, 20).to(w).T @ w.new_ones(3, 3)
    ),
    "copied": lambda w, ids: copy.copy(w).detach() + copy.deepcopy(w.detach()),
    "called": lambda w, ids: w.square().sum(0) * w.T.mean(1),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_an_embedding_may_use_its_weight_in_any_way(operation):
    class Other(nn.Embedding):
        def forward(self, ids):
            return operation(self.weight, ids)

    model, params = on_layer(Other(20, 8), "lora")
    expected = functional_call(model, with_new_weights(model, params, "weight"), (IDS,))
    torch.testing.assert_close(lf.fcall(model, params, IDS, strict=False), expected)


def test_a_convolution_whose_product_was_replaced():
    model, params = on_layer(nn.Conv2d(4, 8, 2), "ia3")
    model._conv_forward = lambda x, W, b: nn.functional.conv2d(input=x, weight=W.tanh(), bias=b)
    x = torch.randn(2, 4, 5, 6).double()
    expected = functional_call(model, with_new_weights(model, params, "weight"), (x,))
    torch.testing.assert_close(lf.fcall(model, params, x), expected)


def test_leaves_that_do_not_fit_an_embedding_are_refused():
    model, params = on_layer(TABLES["plain"], "lora")
    longer = {**params, ".lora.A": torch.ones(2, 1001).double()}
    with pytest.raises(ValueError, match=r"of shape \(2, 1001\), accepted is \(m, 1000\)"):
        lf.fcall(model, longer, IDS)
    with pytest.raises(ValueError, match=r"A: got shape \(1, 2, 1000\), .*; a stack goes through"):
        lf.fcall(model, lf.stack([params]), IDS)
    with pytest.raises(RuntimeError, match="Long, Int"):
        lf.fcall(model, params, torch.ones(2))
    with pytest.raises(lf.UnusedLeafError, match=r"'\.lora\.C'"):
        lf.fcall(model, {**params, ".lora.C": torch.ones(1)}, IDS)


def test_another_parameter_of_an_embedding():
    model = Projected().double().requires_grad_(False)
    cfg = lf.LoRA(r=2, target_modules=(), target_parameters="proj")
    adapters = [scramble(lf.init(model, cfg, seed=seed, dtype=torch.float64)) for seed in (0, 1)]
    ours = lf.vcall(model, lf.stack(adapters), IDS)
    torch.testing.assert_close(ours, torch.stack([lf.fcall(model, one, IDS) for one in adapters]))


def test_a_tied_parameter_and_an_adapter_on_one_of_its_modules():
    model, ids = TiedTwice().double().requires_grad_(False), torch.randint(0, 10, (4, 3))
    cfg = [lf.Full(target_parameters=r"head\.weight"), lf.LoRA(r=2, target_modules="embed")]
    params = scramble(lf.init(model, cfg, dtype=torch.float64))
    trained, constants = lf.partition(params)

    def loss(*leaves):
        point = dict(zip(trained, leaves, strict=True))
        return lf.fcall(model, {**point, **constants}, ids).square().sum()

    assert torch.autograd.gradcheck(loss, tuple(trained.values()))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_trained_bias_beside_a_variant_that_leaves_it(family):
    model = make(family).requires_grad_(False)
    cfg = [lf.Full(target_parameters="bias$"), lf.DoRA(r=2)]
    adapters = [scramble(lf.init(model, cfg, seed=seed), seed) for seed in range(2)]
    params, batch = adapters[0], batch_for(model)
    loss = lf.fcall(model, params, batch)
    again = make(family)
    again.load_state_dict(lf.merge(model, params))
    close = torch.testing.assert_close
    close(loss, again(**batch).loss)
    both = torch.stack([loss, lf.fcall(model, adapters[1], batch)])
    close(lf.vcall(model, adapters, batch), both)
    close(torch.vmap(lf.fcall, (None, 0, None))(model, lf.stack(adapters), batch), both)
    trained = lf.partition(params)[0]
    gradients = torch.autograd.grad(loss, trained.values())
    assert all(gradient.any() for gradient in gradients)
    ours = torch.func.grad(lf.fcall, argnums=1)(model, params, batch)
    for key, gradient in zip(trained, gradients, strict=True):
        close(ours[key], gradient)
    with lf.attach(model, params):
        close(model(**batch).loss, loss)
    with pytest.raises(ValueError, match=r"its bias is named by two configs"):
        lf.init(model, [lf.IA3(), lf.Full(target_parameters="bias$")])
