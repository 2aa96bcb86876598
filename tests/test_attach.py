"""attach: results equal fcall, leaves are registered parameters, removal restores the model."""

import copy
import gc
import inspect
import random
import re
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import Trainer, TrainingArguments

import lora_func as lf
from tests.support.families import EACH_FAMILY, FAMILIES
from tests.support.models import TiedTwice, batch_for, make, scramble
from tests.support.pairs import close, each_pair, moved
from tests.support.quantised import make_quantised
from tests.support.snapshots import assert_same as assert_same_bits
from tests.support.snapshots import snapshot

NAMES = inspect.signature(TrainingArguments).parameters
CHECKPOINTING = next(n for n in NAMES if re.fullmatch("(activation|gradient)_checkpointing", n))
"""The setting's name, which transformers has changed."""


def assert_same(before, model):
    """Ignores version counters, because torch increments them when it registers a parameter."""
    assert_same_bits(before, model, versions=False)


def new_bias(case, family):
    """True if the case adds a bias to layers of this family that have none."""
    return case.name in ("ssteer-ablate", "bitfit-new", "loreft") and family == "qwen3"


@each_pair(lambda case: case.has_weight)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_of_every_variant(case, family, dtype):
    """The loss is the same from fcall, an attached adapter and a merged model."""
    model, params, batch = moved(case, family, dtype)
    expected, before = lf.fcall(model, params, batch), snapshot(model)
    trained = [*lf.partition(params)[0].values()]
    theirs = torch.autograd.grad(expected, trained)
    if new_bias(case, family):
        with pytest.raises(TypeError, match="adds a bias, and the layer has none; run the model"):
            lf.attach(model, params)
        assert_same(before, model)
        return
    with lf.attach(model, params) as handle:
        loss = model(**batch).loss
        close(loss, expected, dtype)
        by_name = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert sum(p.numel() for p in by_name.values()) == sum(leaf.numel() for leaf in trained)
        if dtype == torch.float64:
            ours = torch.autograd.grad(loss, [*by_name.values()])
            norms = [torch.stack([g.norm() for g in gs]).sort().values for gs in (ours, theirs)]
            close(*norms, dtype)
        for key, leaf in handle.params().items():
            assert torch.equal(leaf, params[key])
            assert leaf.requires_grad == params[key].requires_grad
    assert_same(before, model)
    with lf.adapted(model, params):
        close(model(**batch).loss, expected, dtype)


@EACH_FAMILY
def test_of_every_family(family):
    model, batch = family.make(), family.batch()
    params, before = family.adapter(model), snapshot(model)
    with lf.attach(model, params):
        # fcall with an empty adapter, to apply loss_fn
        close(
            lf.fcall(model, {}, batch, loss_fn=family.loss_fn),
            lf.fcall(family.make(), params, batch, loss_fn=family.loss_fn),
        )
    assert_same(before, model)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "bert"])
def test_merging_in_place(family):
    model = make(family).requires_grad_(False)
    cfg = [lf.DoRA(r=2), lf.Full(target_parameters="norm|ln_|LayerNorm")]
    params, batch = scramble(lf.init(model, cfg)), batch_for(model)
    expected, state = lf.fcall(model, params, batch), lf.merge(model, params)
    kinds = [type(module) for module in model.modules()]
    handle = lf.attach(model, params)
    handle.remove(merge=True)
    assert [type(module) for module in model.modules()] == kinds
    assert [*model.state_dict()] == [*state]
    for key, tensor in model.state_dict().items():
        close(tensor, state[key])
    close(model(**batch).loss, expected)
    handle.remove()  # a second call does nothing
    with pytest.raises(ValueError, match="merge: the adapter has been removed"):
        handle.remove(merge=True)


def test_tied_weights():
    family = FAMILIES["gemma3, tied"]
    model, batch = family.make(), family.batch()
    before = snapshot(model)
    head = scramble(lf.init(model, lf.LoRA(r=2, target_modules="lm_head")))
    with lf.attach(model, head) as handle:
        close(model(**batch).loss, lf.fcall(family.make(), head, batch))
        with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight: is tied"):
            handle.remove(merge=True)
        close(model(**batch).loss, lf.fcall(family.make(), head, batch))
    assert_same(before, model)
    everywhere = lf.LoRA(r=2, target_modules=(), target_parameters="embed_tokens")
    for cfg in (everywhere, lf.Full(target_parameters="embed_tokens")):
        both = scramble(lf.init(model, cfg))
        with lf.attach(model, both):
            close(model(**batch).loss, lf.fcall(family.make(), both, batch))
        assert_same(before, model)
        merged = family.make()
        lf.attach(merged, both).remove(merge=True)
        assert merged.lm_head.weight is merged.model.embed_tokens.weight
        close(merged(**batch).loss, lf.fcall(model, both, batch))


def test_the_base_is_frozen_meanwhile():
    model = make("bert")
    model.classifier.requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    with lf.attach(model, lf.init(model, lf.LoRA(r=2))) as handle:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(names) == len(lf.partition(handle.params())[0])
    assert [p.requires_grad for p in model.parameters()] == wanted
    with lf.attach(model, lf.init(model, lf.LoRA(r=2))):
        model.requires_grad_(True)
    assert [p.requires_grad for p in model.parameters()] == wanted


def test_two_adapters_of_one_tied_parameter():
    """One adapts the parameter, one adapts one user of it: calls work, merging raises an error."""
    model, ids = TiedTwice().requires_grad_(False), torch.arange(3)
    cfg = lf.LoRA(r=2, target_modules="head", target_parameters=r"^embed\.weight")
    params = scramble(lf.init(model, cfg))
    with pytest.raises(ValueError, match=r"adapts the parameter that .* adapts, which is tied"):
        lf.merge(model, params)
    expected = lf.fcall(model, params, ids)
    handle = lf.attach(model, params)
    close(model(ids), expected)
    with pytest.raises(ValueError, match="two places of one parameter are adapted to differ"):
        handle.remove(merge=True)
    handle.remove()


def test_what_users_do_with_modules():
    """generate, cached, deepcopy, state dicts, half precision, functional transforms."""
    model = make("qwen3").requires_grad_(False)
    params, batch = scramble(lf.init(model, [lf.HRA(r=2)])), batch_for(model)
    prompt = batch["input_ids"][:1, :4]
    with lf.adapted(model, params):
        expected = model.generate(prompt, max_new_tokens=4, do_sample=False)
    with lf.attach(model, params):
        with parametrize.cached():
            found = model.generate(prompt, max_new_tokens=4, do_sample=False)
        assert torch.equal(found, expected)
        other = copy.deepcopy(model)
        assert torch.equal(other(**batch).loss, model(**batch).loss)
        state = model.state_dict()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not torch.equal(other(**batch).loss, model(**batch).loss)
        other.load_state_dict(state)
        assert torch.equal(other(**batch).loss, model(**batch).loss)
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

        def loss(leaves):
            return torch.func.functional_call(model, leaves, kwargs=batch).loss

        gradients = torch.func.grad(loss)(trained)
        assert all(gradient.any() for gradient in gradients.values())
        other.bfloat16()(**batch)


def rows(model):
    batch = batch_for(model, rows=16)
    return [{name: tensor[i] for name, tensor in batch.items()} for i in range(16)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hugging_faces_trainer_trains_it(tmp_path, checkpointing):
    model = make("qwen3")
    params, batch = lf.init(model, lf.DoRA(r=4)), batch_for(model)
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=4,
        num_train_epochs=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **{CHECKPOINTING: checkpointing},
    )
    with lf.attach(model, params) as handle:
        Trainer(model, arguments, train_dataset=rows(model)).train()
        trained = handle.params()
    model.eval()
    assert lf.fcall(model, trained, batch) < 0.98 * lf.fcall(model, params, batch)
    assert all(not torch.equal(trained[k], leaf) for k, leaf in lf.partition(params)[0].items())
    assert all(torch.equal(tensor, base[key]) for key, tensor in model.state_dict().items())
    lf.save(trained, tmp_path / "a.safetensors", model=model)


def test_accelerate_trains_it():
    from accelerate import Accelerator

    model = make("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    params, batch = lf.init(model, lf.LoRA(r=4, alpha=16)), batch_for(model)
    accelerator = Accelerator(cpu=True)
    with lf.attach(model, params) as handle:
        leaves = [p for p in model.parameters() if p.requires_grad]
        prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(leaves, lr=1e-2))
        for _ in range(10):
            optimizer.zero_grad()
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
        trained = handle.params()
    assert lf.fcall(model, trained, batch) < 0.85 * lf.fcall(model, params, batch)


def test_distributed_data_parallel_trains_it(tmp_path):
    model = make("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    params, batch = lf.init(model, lf.LoRA(r=4)), batch_for(model)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        with lf.attach(model, params) as handle:
            parallel = nn.parallel.DistributedDataParallel(model)
            leaves = [p for p in parallel.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(leaves, lr=0.1)
            parallel(**batch).loss.backward()
            optimizer.step()
            moved = handle.params()
    finally:
        torch.distributed.destroy_process_group()
    solo = {key: leaf.detach().requires_grad_(leaf.requires_grad) for key, leaf in params.items()}
    lf.fcall(model, solo, batch).backward()
    for key, leaf in lf.partition(solo)[0].items():
        close(moved[key], leaf - 0.1 * leaf.grad)


def test_what_is_refused():
    model = make("qwen3").requires_grad_(False)
    before, params = snapshot(model), lf.init(model, lf.LoRA(r=2))
    pairs = [(batch_for(model, seed=5), batch_for(model, seed=6))]
    steering = lf.init(model, lf.SSteer(mode="add"), data=pairs)
    with pytest.raises(TypeError, match=r"q_proj: ssteer_add is not linear in x .* adapted"):
        lf.attach(model, steering)
    with pytest.raises(ValueError, match="is a stack of 2 adapters; take them one by one"):
        lf.attach(model, lf.stack([params, params]))
    with pytest.raises(ValueError, match=r"q_proj\.lora\.C: lora has no such leaf"):
        lf.attach(model, params | {"model.layers.0.self_attn.q_proj.lora.C": torch.ones(1)})
    with lf.adapted(model, params), pytest.raises(lf.BusyModelError, match="attach when it is not"):
        lf.attach(model, params)
    assert_same(before, model)
    with lf.attach(model, params):
        stacked = lf.stack([params, params])
        for call in (
            lambda: lf.attach(model, params),
            lambda: lf.fcall(model, params, batch_for(model)),
            lambda: lf.vcall(model, stacked, batch_for(model)),
            lambda: lf.adapted(model, params).__enter__(),
            lambda: lf.init(model, lf.LoRA(r=2)),
            lambda: lf.merge(model, params),
            lambda: lf.to_lora(params, model, rank=2),
        ):
            with pytest.raises(lf.BusyModelError, match=r"q_proj: has an adapter attached.*remove"):
                call()
    assert_same(before, model)
    computed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    of_it = {f"0.{key}": leaf for key, leaf in lf.init(nn.Linear(4, 4), lf.LoRA(r=2)).items()}
    of_it = {key.replace("..", "."): leaf for key, leaf in of_it.items()}
    for refuse in (lf.attach, lf.merge):
        with pytest.raises(TypeError, match=r"^0: its weight is .*computed when it is read"):
            refuse(computed, of_it)
    quantised = make_quantised("qwen3", "nf4")
    with pytest.raises(TypeError, match=r"q_proj: its weight is quantised.*adapted"):
        lf.attach(quantised, lf.init(quantised, lf.LoRA(r=2, target_modules="q_proj")))


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = make("qwen3")
    before, params = snapshot(model), lf.init(model, lf.LoRA(r=2))
    register, calls = parametrize.register_parametrization, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise RuntimeError("half way")
        return register(*args, **kwargs)

    monkeypatch.setattr(parametrize, "register_parametrization", failing)
    with pytest.raises(RuntimeError, match="half way"):
        lf.attach(model, params)
    assert_same(before, model)


def test_files_of_an_attached_model_know_the_frozen_base(tmp_path):
    model = make("qwen3").requires_grad_(False)
    params = scramble(lf.init(model, [lf.DoRA(r=2), lf.Full(target_parameters="norm")]))
    with lf.attach(model, params) as handle:
        lf.save(handle.params(), tmp_path / "a", model=model)
        assert lf.load(tmp_path / "a", model=model).keys() == params.keys()
    assert lf.load(tmp_path / "a", model=model).keys() == params.keys()


class Stop(BaseException):
    pass


class Interrupt:
    """Counts the lines of lora_func and torch.nn that run in a block, and raises Stop in one.

    Python swallows what is raised in callbacks of weak references, whose lines are elsewhere.
    """

    def __init__(self, at=None):
        self.lines, self.at = 0, at

    def __call__(self, frame, event, _):
        if not re.search(r"[/\\](lora_func|torch[/\\]nn)[/\\]", frame.f_code.co_filename):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise Stop
        return self

    def __enter__(self):
        self.former = sys.gettrace()
        gc.disable()
        sys.settrace(self)
        return self

    def __exit__(self, kind, *_):
        sys.settrace(self.former)
        gc.enable()
        return kind is Stop


@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_interrupts_leave_all_or_nothing(family):
    model, rng = make(family).requires_grad_(False), random.Random(0)
    params = lf.init(model, [lf.IA3(), lf.Full(target_parameters="norm|LayerNorm")])
    before = snapshot(model)
    kinds = [type(module) for module in model.modules()]
    lf.attach(model, params).remove()
    with Interrupt() as attaching:
        handle = lf.attach(model, params)
    with Interrupt() as removing:
        handle.remove()
    last, stopped = attaching.lines + removing.lines, 0
    edges = [*range(1, 40), *range(attaching.lines - 20, attaching.lines + 20)]
    lines = [*edges, *range(last - 40, last + 1), *rng.sample(range(1, last), 120)]
    for at in lines:
        handle = None
        with Interrupt(at) as interrupt:
            handle = lf.attach(model, params)
            handle.remove()
        stopped += interrupt.lines == at
        if handle is not None:
            handle.remove()
        assert_same(before, model)
        assert [type(module) for module in model.modules()] == kinds
        assert torch.is_grad_enabled()
    assert stopped > 0.9 * len(lines)  # what is cached changes the number of lines a little


FAMILIES_TO_TRAIN = {
    "bert": r"^(classifier|bert\.pooler)|LayerNorm|output.*bias",
    "qwen3": "lm_head|norm",
    "tied": "embed_tokens|norm",
    "gpt2": "ln_",
}


@pytest.mark.parametrize("kind", FAMILIES_TO_TRAIN)
def test_trainer_saves_resumes_and_loads_the_best(kind, tmp_path):
    model = make("qwen3", tie_word_embeddings=True) if kind == "tied" else make(kind)
    lora = lf.LoRA(r=2, target_modules="q_proj|query|c_attn")
    cfg = [lora, lf.Full(target_parameters=FAMILIES_TO_TRAIN[kind])]
    params = scramble(lf.init(model, cfg))
    rows = batch_for(model, rows=8)
    data = [{key: value[i] for key, value in rows.items()} for i in range(8)]
    settings = {
        "per_device_train_batch_size": 4,
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }

    def trained(epochs, resume):
        with lf.attach(model, params) as handle:
            arguments = TrainingArguments(tmp_path, num_train_epochs=epochs, **settings)
            trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
            trainer.train(resume_from_checkpoint=resume)
            assert trainer.state.best_model_checkpoint is not None
            return model.eval()(**rows).loss.item(), handle.params()

    trained(1, None)
    loss, found = trained(2, True)
    assert found.keys() == params.keys()
    alone = lf.fcall(model, {key: leaf.detach() for key, leaf in found.items()}, rows)
    assert loss == pytest.approx(alone.item(), rel=1e-4)


def test_an_interrupted_merge_is_completed(monkeypatch):
    model = make("bert").requires_grad_(False)
    params = scramble(lf.init(model, lf.DoRA(r=2)))
    expected, handle, calls = lf.merge(model, params), lf.attach(model, params), []
    copy_ = torch.Tensor.copy_

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) in (2, 5):
            raise KeyboardInterrupt
        return copy_(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        handle.remove(merge=True)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
