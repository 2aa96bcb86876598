"""python -m lora_func: output, one-line error messages, exit status 2."""

import io
import os
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

import lora_func as lf
from lora_func.__main__ import main
from lora_func.peft import from_peft
from lora_func.variants import all_variants
from tests.support.models import batch_for, make, scramble

WHERE = ("--out", "{out}", "--model", "{model}")


def in_process(*arguments):
    command = [sys.executable, "-m", "lora_func", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run(*arguments):
    """The same without the seconds that a process needs to import everything."""
    if "--import" in arguments:  # which would leave its variants to other tests
        return in_process(*arguments)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("default")
        try:
            code = main([*map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def test_a_process_of_its_own(files):
    done = in_process("show", files / "lora")
    assert done.returncode == 0, done.stderr
    assert done.stdout == run("show", files / "lora").stdout
    assert in_process("show", files / "nothing").returncode == 2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A saved model and adapter files for it."""
    folder = tmp_path_factory.mktemp("files")
    model = make("qwen3").requires_grad_(False)
    model.save_pretrained(folder / "model")
    for name, cfg in {"lora": lf.LoRA(r=2), "hra": lf.HRA(r=2)}.items():
        params = scramble(lf.init(model, cfg))
        lf.save(params, folder / name, model=model, cfg=cfg, metadata={"note": "mine [/b]"})
    lf.save(lf.init(model, lf.LoRA(r=2)), folder / "start")
    broken = {key: leaf * torch.nan for key, leaf in lf.init(model, lf.LoRA(r=2)).items()}
    lf.save(broken, folder / "broken", allow_nonfinite=True)
    return folder


def test_show(files):
    done = run("show", files / "lora")
    assert done.returncode == 0, done.stderr
    for part in (
        "q_proj",
        "14 sites",
        "note: mine [/b]",
        "'r': 2",
        "14 weights known",
        "all zero: none",
    ):
        assert part in done.stdout, part
    assert "all zero: 14 of 42 leaves, such as" in run("show", files / "start").stdout
    assert "not finite: 42 of 42" in run("show", files / "broken").stdout


def test_convert_to_peft(files, tmp_path):
    done = run(
        "convert", files / "lora", "--to", "peft", "--out", tmp_path, "--model", files / "model"
    )
    assert done.returncode == 0, done.stderr
    found = from_peft(tmp_path, make("qwen3"))
    assert all(torch.equal(found[k], leaf) for k, leaf in lf.load(files / "lora").items())


def test_convert_to_a_lora(files, tmp_path):
    done = run(
        "convert", files / "hra", "--to", "lora", "--out", tmp_path, "--model", files / "model"
    )
    assert done.returncode == 0, done.stderr
    assert "largest relative error" in done.stdout
    model = make("qwen3").requires_grad_(False)
    batch, found = batch_for(model), lf.load(tmp_path / "adapter.safetensors", model=model)
    expected = lf.fcall(model, lf.load(files / "hra", model=model), batch)
    torch.testing.assert_close(lf.fcall(model, found, batch), expected, rtol=1e-4, atol=1e-5)


def test_diff(files):
    nan = run("diff", files / "broken", files / "broken")
    assert (nan.returncode, nan.stdout) == (0, "42 leaves are the same\n")
    same = run("diff", files / "lora", files / "lora")
    assert (same.returncode, same.stdout) == (0, "42 leaves are the same\n")
    done = run("diff", files / "lora", files / "start")
    assert done.returncode == 1
    assert done.stdout.count("lora.") == 28
    assert "only in" in run("diff", files / "lora", files / "hra").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nothing"], "nothing: there is no such file"),
        (["show", "."], "adapter_config.json: there is no such file"),
        (["diff", "{lora}", "nothing"], "there is no such file"),
        (
            [
                "convert",
                "{hra}",
                "--to",
                "lora",
                "--rank",
                "1",
                "--out",
                "{out}",
                "--model",
                "{model}",
            ],
            "a LoRA of rank 1 misses",
        ),
        (["convert", "{lora}", "--to", "peft", "--out", "{out}", "--model", "{out}/none"], "none"),
    ],
)
def test_errors_are_one_line(files, tmp_path, arguments, message):
    places = {"out": tmp_path, **{name: files / name for name in ("lora", "hra", "model")}}
    done = run(*(argument.format(**places) for argument in arguments))
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("lora_func: ")
    assert message in last
    assert "Traceback" not in done.stderr


def test_usage():
    assert run().returncode == 2
    assert "show" in run("--help").stdout


def test_show_of_other_kinds(files, tmp_path):
    model = make("qwen3").requires_grad_(False)
    adapters = [lf.init(model, lf.LoRA(r=2, dropout=0.1), seed=seed) for seed in range(2)]
    lf.save(lf.stack(adapters), tmp_path / "stack")
    done = run("show", tmp_path / "stack")
    assert done.returncode == 0, done.stderr
    assert "a stack of 2 adapters" in done.stdout
    assert "'config': 'LoRA'" in done.stdout
    assert "'dropout': [0.1" in done.stdout
    optimizer = torch.optim.AdamW([leaf for one in adapters for leaf in one.values()])
    lf.save_training_state(adapters, optimizer, tmp_path / "state", step=7, extra={"lr": 0.5})
    done = run("show", tmp_path / "state")
    assert done.returncode == 0, done.stderr
    for part in ("adapter 1 of 2", "step: 7", "'lr': 0.5", "14 sites"):
        assert part in done.stdout, part
    lf.peft.to_peft(adapters[0], tmp_path / "peft", model=model)
    done = run("show", tmp_path / "peft")
    for part in ("q_proj.lora_A.weight", "(2, 32)", "peft_type: LORA", "lora_dropout: 0.1"):
        assert part in done.stdout, part
    done = run("show", tmp_path / "peft", "--model", files / "model")
    assert done.returncode == 0, done.stderr
    assert "14 sites" in done.stdout
    where = ("--out", tmp_path / "lora", "--model", files / "model")
    run("convert", tmp_path / "peft", "--to", "lora", "--rank", "2", *where)
    assert "14 sites" in run("show", tmp_path / "lora").stdout


def test_a_base_with_settings_and_of_another_package(files, tmp_path):
    bert = make("bert").requires_grad_(False)
    bert.save_pretrained(tmp_path / "model")
    (tmp_path / "mine.py").write_text(
        "from transformers import BertForSequenceClassification\n"
        "class Mine(BertForSequenceClassification): pass\n"
    )
    params = scramble(lf.init(bert, lf.LoRA(r=2)))
    lf.save(params, tmp_path / "a")
    where = ("--to", "peft", "--out", tmp_path / "out", "--model", tmp_path / "model")
    kind = ("--import", "mine", "--model-class", "mine.Mine")
    command = [sys.executable, "-m", "lora_func", "convert", tmp_path / "a", *where, *kind]
    command += ["--config", "num_labels=3", "--config", "hidden_act=gelu"]
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    again = tmp_path / "again"
    done = run(
        "convert",
        tmp_path / "out",
        *where[:2],
        "--out",
        again,
        *where[4:],
        "--model-class",
        "AutoModelForSequenceClassification",
    )
    assert done.returncode == 0, done.stderr
    assert all(torch.equal(from_peft(again, bert)[k], leaf) for k, leaf in params.items())
    done = run("convert", tmp_path / "a", *where, "--config", "num_labels")
    assert done.returncode == 2
    assert "--config: got 'num_labels', expected key=value" in done.stderr
    for name in ("BertConfig", "Nothing", "nowhere.Model"):
        done = run("convert", tmp_path / "a", *where, "--model-class", name)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1


def test_variants_lists_what_each_costs():
    done = run("variants", "--width", "64", "--rank", "4")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.split()}
    assert {name for v in all_variants() for name in v.trials} - {"template"} <= rows.keys()
    assert rows["lora"][:5] == ["low-rank", "512", "512", "0", "1"]
    assert rows["lora-xs"][:4] == ["SVD", "16", "512", "1,024"]
    assert rows["ia3"][:5] == ["multiplicative", "64", "0", "0", "0"]


def test_variants_says_why_a_width_does_not_fit():
    done = run("variants", "--width", "48", "--rank", "4")
    assert done.returncode == 0, done.stderr
    assert "block_size = 64 does not divide d_in = 48" in " ".join(done.stdout.split())
