"""The summary table of an adapter."""

import io

import pytest
import rich.console
import torch
from torch import nn

import lora_func as lf


def shown(table):
    console = rich.console.Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()


def rows(text):
    return {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}


def test_an_adapter():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    cfg = [lf.LoRA(r=2, alpha=3, target_modules="0"), lf.Full(target_parameters=r"1\.")]
    params = lf.init(model, cfg)
    params["0.lora.B"].data.normal_()
    delta = 1.5 * params["0.lora.B"] @ params["0.lora.A"]
    text = shown(lf.summary(params, model))
    table = rows(text)
    assert table["0"] == ["0", "lora", "2", "1.5", "float32", "20", f"{delta.norm().item():.4g}"]
    assert table["1"] == ["1", "full", "–", "–", "float32", "14", "–"]
    assert table["2"] == ["2", "sites", "34"]
    assert f"{34 / 44:.3%} of the model's parameters" in text
    assert "parameters" not in shown(lf.summary(params))


def test_a_stack():
    model = nn.Linear(4, 4)
    adapters = [lf.init(model, lf.LoRA(r=r, alpha=r * r)) for r in (1, 3)]
    adapters[1][".lora.B"].data.normal_()
    table = rows(shown(lf.summary(lf.stack(adapters))))
    assert table["(the"][2:8] == ["lora", "3", "1", "…", "3", "float32"]
    assert table["(the"][8:11] == ["48", "0", "…"]


def test_a_malformed_key():
    with pytest.raises(KeyError, match="is no adapter key"):
        lf.summary({"A": torch.zeros(2)})


def test_it_prints_as_text():
    text = str(lf.summary(lf.init(nn.Sequential(nn.Linear(4, 4)), lf.LoRA(r=2))))
    assert rows(text)["0"][1] == "lora"
    assert rows(text)["site"][-1] == "‖ΔW‖"


def test_a_narrow_terminal_shows_the_ends_of_paths():
    inner, path = (
        nn.Sequential(nn.Linear(4, 4)),
        "a.very.long.path.of.a.layer.inside.some.big.vision.tower",
    )
    for name in reversed(path.split(".")):
        inner = nn.ModuleDict({name: inner})
    params = lf.init(inner, lf.LoRA(r=2))
    console = rich.console.Console(file=io.StringIO(), width=80)
    console.print(lf.summary(params))
    (line,) = (line for line in console.file.getvalue().splitlines() if "tower.0" in line)
    assert line.strip().startswith("…")
    assert "float32" in line
