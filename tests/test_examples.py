"""Every example runs with small settings on tiny models."""

import captured
import hypernetwork
import influence
import maml
import per_sample_gradients
import pytest
import qlora
import sweep
import torch
import variants_race

import lora_func as lf

SMALL = ["--packages", "3", "--most", "16", "--length", "12", "--batch-size", "8", "--epochs", "1"]


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(example, plot, *arguments):
        assert example.main([*arguments]) == 0
        assert (tmp_path / plot).stat().st_size > 10_000

    return run


@pytest.mark.parametrize("halving", [[], ["--halving"]], ids=["", "halving"])
def test_sweep(run, tiny, tmp_path, capsys, halving):
    grid = ["--ranks", "2,4", "--alphas", "4", "--lrs", "1e-3,1e-2", "--seeds", "0,1"]
    run(sweep, "sweep.png", "--model", str(tiny), *SMALL, *grid, *halving)
    shown = capsys.readouterr().out
    assert shown.count("%") == 8
    assert any(".lora.A" in key for key in lf.load(tmp_path / "best.safetensors"))
    steps = {line.split()[4] for line in shown.splitlines() if line.strip().endswith("%")}
    assert (len(steps) > 1) == bool(halving)


@pytest.mark.slow
def test_variants_race(run, tiny, capsys):
    run(variants_race, "race.png", "--model", str(tiny), *SMALL)
    assert capsys.readouterr().out.count("%") == len(variants_race.VARIANTS)


def test_per_sample_gradients(run, tiny):
    run(per_sample_gradients, "per_sample.png", "--model", str(tiny), *SMALL)


def test_influence(run, tiny):
    run(influence, "influence.png", "--model", str(tiny), *SMALL, "--wrong", "0.4")


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora(run, tiny, capsys, bits):
    run(qlora, "qlora.png", "--model", str(tiny), *SMALL, "--bits", str(bits))
    assert capsys.readouterr().out.count(f"{bits} bits, sweep") == 8


def test_captured(run, capsys):
    run(captured, "captured.png", "--width", "64", "--layers", "1", "--steps", "4")
    shown = capsys.readouterr().out
    assert ("nothing was captured" in shown) == (not torch.cuda.is_available())
    assert "as it is" in shown


def test_maml(run):
    run(maml, "maml.png", "--steps", "60", "--base-steps", "20")


def test_hypernetwork(run):
    run(hypernetwork, "hypernetwork.png", "--steps", "60", "--base-steps", "20")


def test_an_unknown_variant_is_refused(capsys):
    with pytest.raises(SystemExit):
        variants_race.main(["--variants", "lora,nothing"])
    assert "no variants ['nothing']" in capsys.readouterr().err
