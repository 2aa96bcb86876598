"""Files: load returns the saved dict bit for bit, or raises an error with the reason."""

import json
import os
import random
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora_func as lf
from lora_func.files import _container
from lora_func.files._container import ENTRY
from lora_func.files._fingerprint import fingerprint
from lora_func.runtime import _layout
from tests.support.families import EACH_FAMILY
from tests.support.models import batch_for, make, scramble
from tests.support.pairs import adapter, each_pair
from tests.support.quantised import KINDS, make_quantised
from tests.support.snapshots import assert_same, snapshot


def assert_identical(ours, theirs):
    assert [*ours] == [*theirs]
    for key, leaf in theirs.items():
        assert torch.equal(ours[key], leaf), key
        assert ours[key].dtype == leaf.dtype
        assert ours[key].requires_grad == leaf.requires_grad
        assert ours[key].data_ptr() % 16 == 0


@each_pair()
def test_every_variant_comes_back(case, family, tmp_path):
    model = make(family).requires_grad_(False)
    params, path = scramble(adapter(case, model)), tmp_path / "a.safetensors"
    before = snapshot(model)
    lf.save(params, path, model=model, cfg=case.config(2), metadata={"note": "ünicode"})
    assert_identical(lf.load(path, model=model), params)
    assert_identical(lf.load(str(path)), params)
    assert_same(before, model)
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()[ENTRY])["facts"]
        assert file.metadata()["note"] == "ünicode"
    assert facts["configs"][0]["config"] == type(case.config(2)).__name__
    assert [path] == [*tmp_path.iterdir()]


@EACH_FAMILY
def test_every_family_comes_back(family, tmp_path):
    model, path = family.make(), tmp_path / "a.safetensors"
    params = family.adapter(model)
    lf.save(params, path, model=model)
    assert_identical(lf.load(path, model=model), params)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_quantised_base(kind, tmp_path):
    model, path = make_quantised("qwen3", kind), tmp_path / "a.safetensors"
    params = scramble(lf.init(model, lf.DoRA(r=2)))
    lf.save(params, path, model=model)
    model(**batch_for(model))  # an 8-bit layer moves its codes at the first call
    assert_identical(lf.load(path, model=model), params)
    with pytest.raises(lf.AdapterFileError, match=r"down_proj\.weight: float32 .*, in the file"):
        lf.load(path, model=make("qwen3"))


@pytest.mark.parametrize("ranks", [(2, 2), (1, 3)], ids=str)
def test_stacks_come_back(ranks, tmp_path):
    model, path = make("qwen3").requires_grad_(False), tmp_path / "stack.safetensors"
    head = lf.Full(target_parameters="norm")
    for config in (lf.LoRA, lf.VeRA):
        adapters = [scramble(lf.init(model, [config(r=r), head], seed=r)) for r in ranks]
        stacked = {key: leaf.detach() for key, leaf in lf.stack(adapters).items()}
        lf.save(stacked, path, model=model)
        found = lf.load(path, model=model)
        for one, adapter_ in zip(lf.unstack(found), adapters, strict=True):
            assert all(torch.equal(one[key], leaf) for key, leaf in adapter_.items())


def lora(model=None, **settings):
    return scramble(lf.init(model or nn.Linear(6, 4), lf.LoRA(r=2, **settings)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p: {}, ValueError, "params: got no leaf"),
        (lambda p: p | {".lora.A": p[".lora.A"] * torch.nan}, ValueError, r"\.lora\.A: holds NaN"),
        (lambda p: p | {".lora.A": p[".lora.A"].to("meta")}, ValueError, "lora.A: has no data"),
        (lambda p: p | {".lora.A": p[".lora.A"][:, :0]}, ValueError, r"lora.A: got shape \(2, 0\)"),
        (lambda p: p | {".lora.A": p[".lora.A"].int()}, TypeError, "lora.A: got torch.int32"),
        (lambda p: p | {".lora.A": [1.0]}, TypeError, "lora.A: got list"),
        (lambda p: p | {".lora.C": p[".lora.A"]}, ValueError, "lora.C: lora has no such leaf"),
        (lambda p: p | {"x": p[".lora.A"]}, KeyError, "no adapter key"),
        (lambda p: p | {".nothing.A": p[".lora.A"]}, KeyError, "nothing"),
        (lambda p: p | {"a.lora.A": p[".lora.A"]}, KeyError, "no module and no parameter 'a'"),
        (lambda p: {k: p[k] for k in [*p][:2]}, ValueError, r"lora\._scale: this leaf is missing"),
        (
            lambda p: p | {".lora.B": p[".lora.B"][:, :1]},
            ValueError,
            r"lora\.B: got shape \(4, 1\), expected \(d_out=4, r=2\)",
        ),
        (
            lambda p: p | {".lora.B": p[".lora.B"][:1]},
            ValueError,
            r"lora\.B: got shape \(1, 2\), expected \(d_out=4, r=2\)",
        ),
        (lambda p: p | {".lora.A": p[".lora.A"][None]}, ValueError, "lora.B: got shape"),
        (lambda p: {k: leaf[None, None] for k, leaf in p.items()}, ValueError, "leading axes"),
        (lambda p: p | {".full.weight": torch.ones(4, 6)}, ValueError, "adapted twice"),
    ],
)
def test_what_is_not_saved(tmp_path, change, error, message):
    path, model = tmp_path / "a.safetensors", nn.Linear(6, 4)
    lf.save(lora(model), path, model=model)
    before = path.read_bytes()
    with pytest.raises(error, match=message):
        lf.save(change(lora(model)), path, model=model)
    assert path.read_bytes() == before
    assert [path] == [*tmp_path.iterdir()]


def test_more_that_is_not_saved(tmp_path):
    model = nn.Linear(6, 4)
    params = lora(model)
    with pytest.raises(TypeError, match="metadata: got 'a': 1, expected text"):
        lf.save(params, tmp_path / "a", metadata={"a": 1})
    with pytest.raises(ValueError, match="metadata: the name 'lora_func' is taken"):
        lf.save(params, tmp_path / "a", metadata={"lora_func": ""})
    with pytest.raises(OSError, match="nowhere"):
        lf.save(params, tmp_path / "nowhere" / "a")
    wrong = lf.init(model, lf.Full(target_parameters="bias")) | {".full.bias": torch.ones(3)}
    with pytest.raises(ValueError, match=r"full\.bias: got shape \(3,\), the parameter has \(4,\)"):
        lf.save(wrong, tmp_path / "a", model=model)
    assert not [*tmp_path.iterdir()]


UNFIT = {
    "fewer blocks": (lf.OFT(block_size=2), {".oft.R": (2, 1)}),
    "larger blocks": (lf.OFT(block_size=2), {".oft.R": (4, 3)}),
    "more groups": (
        lf.ROAD(group_size=2),
        {".road1.theta": (8, 1), ".road1.alpha": (8, 1)},
    ),
    "pairs of another rank": (lf.SSVD(r=3), {".ssvd.K": (6,)}),
    "blocks of another rank": (lf.AntiPaSTO(r=4, block_size=2), {".antipasto.rot_V": (3, 1)}),
}


@pytest.mark.parametrize(("cfg", "shapes"), UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize("adapters", [1, 2])
def test_leaves_that_do_not_make_up_the_weight(cfg, shapes, adapters, tmp_path):
    model = nn.Linear(8, 12)
    params = lf.init(model, cfg) | {key: torch.zeros(shape) for key, shape in shapes.items()}
    params = lf.stack([params] * adapters) if adapters > 1 else params
    with pytest.raises(ValueError, match=r"do not fit a weight \(12, 8\)|expected \(d_out/g"):
        lf.save(params, tmp_path / "a", model=model)
    with pytest.raises((RuntimeError, ValueError)):
        lf.fcall(model, params, torch.ones(4, 8))
    assert not [*tmp_path.iterdir()]


class Switch(lf.LinearConfig):
    """Its variant branches on a value, so shapes alone cannot verify its leaves."""


def _start(W, cfg, generator, stats):
    return {"g": torch.ones(W.shape[0]), "_off": torch.zeros(())}


def _apply(W, params, x):
    return lf.linear(x, W) * (1 if params["_off"].item() else params["g"])


lf.register(lf.Variant("switch", Switch, _start, _apply, leaves={"g": "any", "_off": ""}))


def test_a_variant_whose_shapes_tell_little(tmp_path):
    model, path = nn.Linear(6, 4), tmp_path / "a"
    params = lf.init(model, Switch())
    lf.save(params, path, model=model)
    assert_identical(lf.load(path, model=model), params)


def test_a_variant_that_looks_at_a_number_is_tried_with_numbers(tmp_path):
    wrong = {".switch.g": torch.zeros(5), ".switch._off": torch.zeros(())}
    with pytest.raises(ValueError, match=r"do not fit a weight \(4, 6\)"):
        lf.save(wrong, tmp_path / "a", model=nn.Linear(6, 4))


def test_non_finite_leaves_if_asked(tmp_path):
    params = {key: leaf * torch.nan for key, leaf in lora().items()}
    lf.save(params, tmp_path / "a", allow_nonfinite=True)
    assert all(leaf.isnan().all() for leaf in lf.load(tmp_path / "a").values())


def test_another_base(tmp_path):
    model, path = make("qwen3").requires_grad_(False), tmp_path / "a.safetensors"
    params = lora(model, target_modules="q_proj")
    lf.save(params, path, model=model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    message = (
        r"1 of its weights differ:\n  model\.layers\.0\.self_attn\.q_proj\.weight: other values"
    )
    with pytest.raises(lf.AdapterFileError, match=message):
        lf.load(path, model=model)
    narrow = make("qwen3")
    narrow.model.layers[0].self_attn.q_proj = nn.Linear(32, 16, bias=False)
    with pytest.raises(lf.AdapterFileError, match=r"bfloat16 \(32, 32\), in the file float32"):
        lf.load(path, model=model.bfloat16())
    with pytest.raises(lf.AdapterFileError, match=r"B: got shape \(32, 2\), expected \(d_out=16"):
        lf.load(path, model=narrow)
    with pytest.raises(lf.AdapterFileError, match="no module and no parameter"):
        lf.load(path, model=make("gpt2"))
    assert_identical(lf.load(path), params)


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_a_weight_of_more_than_single_precision_counts(tmp_path, default):
    model = nn.Linear(2, 2).requires_grad_(False)
    model.weight = nn.Parameter(torch.ones(1).expand(2**13, 2**12), requires_grad=False)
    torch.set_default_dtype(default)
    try:
        place = fingerprint(model, {".full.weight": torch.ones(2**13, 2**12)})
    finally:
        torch.set_default_dtype(torch.float32)
    assert place == fingerprint(model, {".full.weight": torch.ones(2**13, 2**12)})


def test_where_files_lie(tmp_path):
    """Links, permissions, long names, inference mode."""
    params = lora()
    real, link = tmp_path / "real", tmp_path / "link"
    lf.save(params, real)
    real.chmod(0o600)
    link.symlink_to(real)
    lf.save(lora(alpha=7), link)
    assert link.is_symlink()
    assert lf.load(real)[".lora._scale"] == 3.5
    assert real.stat().st_mode & 0o777 == 0o600
    lf.save(params, tmp_path / ("n" * 250))
    with torch.inference_mode():
        assert lf.load(real)[".lora.A"].requires_grad
    for path in (tmp_path, "", "."):
        with pytest.raises(OSError, match="is a folder"):
            lf.save(params, path)
    lf.save({k: leaf.detach().to(torch.float8_e4m3fn) for k, leaf in params.items()}, real)


def test_dying_leaves_the_old_file_or_the_new(tmp_path):
    """The process is killed before and after each ``os.fsync`` and ``os.replace``."""
    program = """
import os, sys, torch, lora_func as lf
path, when = sys.argv[1], int(sys.argv[2])
model = torch.nn.Linear(6, 4)
lf.save(lf.init(model, lf.LoRA(r=2), seed=0), path)
calls = 0
def dying(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == when:
            os._exit(9)
        done = function(*args, **kwargs)
        calls += 1
        if calls == when:
            os._exit(9)
        return done
    return call
os.fsync, os.replace = map(dying, (os.fsync, os.replace))
lf.save(lf.init(model, lf.LoRA(r=2), seed=1), path)
"""
    model = nn.Linear(6, 4)
    starts = [lf.init(model, lf.LoRA(r=2), seed=seed) for seed in (0, 1)]
    seen = set()
    for when in range(1, 8):
        path = tmp_path / f"{when}.safetensors"
        command = [sys.executable, "-c", program, str(path), str(when)]
        status = subprocess.run(command, check=False).returncode
        found = lf.load(path)
        whose = [k for k, one in enumerate(starts) if torch.equal(found[".lora.A"], one[".lora.A"])]
        assert len(whose) == 1
        seen.add((status, *whose))
    assert seen == {(9, 0), (9, 1), (0, 1)}


def test_what_is_written_is_read_again(tmp_path, monkeypatch):
    lf.save(lora(), tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    read = _container.read

    def misread(path, kind):
        content = read(path, kind)
        return content._replace(tensors={k: t + 1 for k, t in content.tensors.items()})

    monkeypatch.setattr(_container, "read", misread)
    with pytest.raises(OSError, match="is not what is read"):
        lf.save(lora(alpha=7), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "a.safetensors"
    lf.save(lora(), path, metadata={"note": "a note"})
    return path.read_bytes()


def test_every_truncation_is_refused(good, tmp_path):
    """Truncation at every byte of the header, and at many bytes of the tensors."""
    header = 8 + struct.unpack("<Q", good[:8])[0]
    path = tmp_path / "a.safetensors"
    for end in [*range(header + 1), *range(header, len(good), 7)]:
        path.write_bytes(good[:end])
        with pytest.raises(lf.AdapterFileError, match=r"a\.safetensors: "):
            lf.load(path)
    path.write_bytes(good + b"more")
    with pytest.raises(lf.AdapterFileError, match=r"a\.safetensors: "):
        lf.load(path)


def test_every_flipped_bit_is_noticed(good, tmp_path):
    """A flip is harmless where the JSON stays equal: white space, or the case of an escape."""
    path, rng = tmp_path / "a.safetensors", random.Random(0)
    expected = load(good, path)
    for place in rng.sample(range(8 * len(good)), 600):
        broken = bytearray(good)
        broken[place // 8] ^= 1 << place % 8
        path.write_bytes(broken)
        try:
            found = lf.load(path)
        except lf.AdapterFileError:
            continue
        assert_identical(found, expected)


def load(content, path):
    path.write_bytes(content)
    return lf.load(path)


def test_files_of_another_kind(good, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        lf.load(path)
    with pytest.raises(lf.AdapterFileError, match="is no file"):
        lf.load(tmp_path)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(lf.AdapterFileError, match="a pickle or a zip, which is never loaded"):
        lf.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(lf.AdapterFileError, match="a pickle or a zip"):
        lf.load(path)
    for content in (b"", b"\0" * 100, b"\xff" * 100, struct.pack("<Q", 2**62) + b"{}"):
        with pytest.raises(lf.AdapterFileError, match="no safetensors file, or a broken one"):
            load(content, path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(lf.AdapterFileError, match="that lora_func has not written"):
        lf.load(path)


def test_other_facts(tmp_path):
    path = tmp_path / "a.safetensors"
    lf.save(lora(), path)
    with safe_open(path, "pt") as file:
        ours = json.loads(file.metadata()[ENTRY])
    tensors = load_file(path)
    for changed, message in [
        (ours | {"format": 2}, "has format version 2, this release reads 1"),
        (ours | {"kind": "training state"}, "is a file of 'training state', expected 'adapter'"),
        (ours | {"crc32": 0}, "its checksum is wrong"),
        ({}, "its metadata are broken"),
        ([], "its metadata are broken"),
    ]:
        save_file(tensors, path, {ENTRY: json.dumps(changed)})
        with pytest.raises(lf.AdapterFileError, match=message):
            lf.load(path)
    save_file(tensors, path, {ENTRY: "{"})
    with pytest.raises(lf.AdapterFileError, match="its metadata are broken"):
        lf.load(path)


def test_contents_that_are_no_adapter(tmp_path):
    """Complete files with leaves that do not match their variants."""
    path, params = tmp_path / "a", {k: leaf.detach() for k, leaf in lora().items()}
    for changed, message in [
        ({}, "params: got no leaf"),
        ({".nothing.A": torch.ones(1)}, "nothing"),
        (params | {".lora.A": params[".lora.A"].long()}, r"lora\.A: got torch.int64, expected"),
        ({k: params[k] for k in [*params][1:]}, r"lora\.A: this leaf is missing"),
        (params | {".lora.B": params[".lora.B"][:, :1]}, r"lora\.B: got shape \(4, 1\)"),
    ]:
        _container.write(path, _container.Content("adapter", changed, {"base": None}, {}))
        with pytest.raises(lf.AdapterFileError, match=message):
            lf.load(path)


def training(model, params, optimizer, scheduler, steps):
    """Train with every random generator that a training state saves."""
    for _ in range(steps):
        optimizer.zero_grad()
        batch = batch_for(model, seed=random.randrange(100))
        loss = lf.vcall(model, lf.stack(params), batch)
        (loss * torch.rand(len(params))).sum().backward()
        optimizer.step()
        scheduler.step()


def optimizer_of(params, kind):
    leaves = [[*lf.partition(one)[0].values()] for one in params]
    groups = [{"params": own, "lr": 1e-2 / (k + 1)} for k, own in enumerate(leaves)]
    optimizer = kind(groups)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


@pytest.mark.parametrize(
    "kind",
    [
        lambda groups: torch.optim.AdamW(groups, amsgrad=True),
        lambda groups: torch.optim.SGD(groups, momentum=0.9),
        lambda groups: torch.optim.AdamW(
            [group | {"lr": torch.tensor(group["lr"])} for group in groups], capturable=False
        ),
    ],
    ids=["AdamW", "SGD", "a tensor for lr"],
)
def test_training_goes_on_bit_for_bit(tmp_path, kind):
    """Ten steps equal five steps, save, load and five steps."""
    model = make("qwen3", attention_dropout=0.1).requires_grad_(False).train()

    def begun():
        torch.manual_seed(3)
        random.seed(3)
        params = [lf.init(model, lf.LoRA(r=2), seed=seed) for seed in range(2)]
        return params, *optimizer_of(params, kind)

    params, optimizer, scheduler = begun()
    lf.vcall(model, lf.stack(params), batch_for(model))
    torch.manual_seed(3)
    training(model, params, optimizer, scheduler, 10)
    again, optimizer, scheduler = begun()
    training(model, again, optimizer, scheduler, 5)
    path, extra = tmp_path / "state", {"last_epoch": scheduler.last_epoch}
    lf.save_training_state(again, optimizer, path, step=5, model=model, extra=extra)
    torch.rand(7)
    random.random()
    state = lf.load_training_state(path, model=model)
    optimizer, scheduler = optimizer_of(state.params, kind)
    optimizer.load_state_dict(state.optimizer)
    scheduler.load_state_dict(state.extra)
    state.restore_rng()
    assert state.step == 5
    training(model, state.params, optimizer, scheduler, 5)
    for ours, theirs in zip(state.params, params, strict=True):
        assert all(torch.equal(ours[key], leaf) for key, leaf in theirs.items())


def test_schedules_come_back(tmp_path):
    """MultiStepLR has integer keys; JSON keys are strings."""
    params = lora()

    def begun():
        optimizer = torch.optim.SGD([*lf.partition(params)[0].values()], lr=1.0)
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [5], 0.1)

    optimizer, scheduler = begun()
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    extra = scheduler.state_dict() | {"tensor": torch.ones(2), "none": None, "nested": {1: [2.5]}}
    lf.save_training_state(params, optimizer, tmp_path / "a", step=3, extra=extra)
    state = lf.load_training_state(tmp_path / "a")
    assert state.extra["nested"] == {1: [2.5]}
    assert torch.equal(state.extra.pop("tensor"), torch.ones(2))
    optimizer, scheduler = begun()
    optimizer.load_state_dict(state.optimizer)
    scheduler.load_state_dict(state.extra)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(0.1)]


def test_a_training_state_is_strict_too(tmp_path):
    model, path = nn.Linear(6, 4), tmp_path / "state"
    params = lora(model)
    optimizer = torch.optim.AdamW(lf.partition(params)[0].values())
    lf.save_training_state(params, optimizer, path, step=0, model=model)
    assert isinstance(lf.load_training_state(path, model=model).params, dict)
    with pytest.raises(lf.AdapterFileError, match="other values"):
        lf.load_training_state(path, model=nn.Linear(6, 4))
    with pytest.raises(lf.AdapterFileError, match="is a file of 'training state'"):
        lf.load(path)
    lf.save(params, path)
    with pytest.raises(lf.AdapterFileError, match="is a file of 'adapter'"):
        lf.load_training_state(path)
    with pytest.raises(ValueError, match="params: got no adapter"):
        lf.save_training_state([], optimizer, path, step=0)
    with pytest.raises(TypeError, match=r"extra\.a is a object; accepted are tensors, numbers"):
        lf.save_training_state(params, optimizer, path, step=0, extra={"a": object()})
    with pytest.raises(TypeError, match=r"extra: the name b'a' is a bytes; .* or tuples of these"):
        lf.save_training_state(params, optimizer, path, step=0, extra={b"a": 1})
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions of this kind")
def test_a_file_has_the_permissions_of_others(tmp_path):
    lf.save(lora(), tmp_path / "a")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_training_state_keeps_any_names_apart(tmp_path):
    params = lora()
    optimizer = torch.optim.AdamW(lf.partition(params)[0].values())
    numbers = (torch.tensor(float(i)) for i in range(100))
    extra = {
        "a.b": next(numbers),
        "a": {"b": next(numbers), "": next(numbers)},
        "": [next(numbers), {"0": next(numbers)}],
        "c": {1: next(numbers), "1": next(numbers), None: 2.5, (1, "a"): [None]},
        "__tensor__": "optimizer.1",
        "d": {"__tensor__": "x"},
        "e": {"__pairs__": [[1, 2]]},
    }
    lf.save_training_state(params, optimizer, tmp_path / "a", step=1, extra=extra)
    assert str(lf.load_training_state(tmp_path / "a").extra) == str(extra)


def test_a_head_with_other_values_is_the_same_base(tmp_path):
    base, other, path = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), None, tmp_path / "a"
    other = nn.Sequential(base[0], nn.Linear(4, 2))
    cfg = [lf.LoRA(r=2, target_modules="0"), lf.Full(target_parameters=r"^1\.")]
    params = scramble(lf.init(base, cfg))
    lf.save(params, path, model=base)
    x = torch.ones(3, 4)
    assert torch.equal(lf.fcall(other, lf.load(path, model=other), x), lf.fcall(base, params, x))
    with pytest.raises(lf.AdapterFileError, match=r"1 of its weights differ:\n  0\.weight"):
        lf.load(path, model=nn.Sequential(nn.Linear(4, 4), base[1]))
    with pytest.raises(lf.AdapterFileError, match=r"full\.weight: got shape"):
        lf.load(path, model=nn.Sequential(base[0], nn.Linear(4, 3)))


def test_leaves_are_loaded_where_the_sites_are(tmp_path, monkeypatch):
    model, path = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), tmp_path / "a"
    cfg = [lf.VeRA(r=2, target_modules="1"), lf.Full(target_parameters="0.bias")]
    params = lf.init(model, cfg)
    lf.save(params, path)
    assert {leaf.device.type for leaf in lf.load(path, model=model).values()} == {"cpu"}
    devices = {model[0]: torch.device("cuda:0"), model[1]: torch.device("cuda:1")}
    monkeypatch.setattr(_layout, "device_of_module", lambda module, name: devices[module])
    assert {key: d.index for key, d in _layout.devices_of(params, model).items()} == {
        key: 0 if key.startswith("0") else 1 for key in params
    }


KILLED = """
import os, sys, torch, lora_func as lf
from lora_func.files import _container
_container.os.replace = lambda *_: os.kill(os.getpid(), 9)
lf.save(lf.init(torch.nn.Linear(4, 4), lf.LoRA(r=2)), sys.argv[1])
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_what_a_killed_process_left_is_removed_by_the_next_save(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    for one in (path, other):
        subprocess.run([sys.executable, "-c", KILLED, str(one)], check=False)
    alive = replace_with_process(next(tmp_path.iterdir()), os.getpid())
    assert len([*tmp_path.iterdir()]) == 3
    lf.save(lora(), path)
    lf.save(lora(), other)
    assert {*tmp_path.iterdir()} == {path, other, alive}


def replace_with_process(temporary, process):
    """Copy a temporary file as if a living process were writing it."""
    parts = temporary.name.split(".")
    copy = temporary.with_name(".".join([*parts[:3], str(process), *parts[4:]]))
    copy.write_bytes(temporary.read_bytes())
    return copy
