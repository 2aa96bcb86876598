"""Every example runs with small settings on tiny models."""

from argparse import Namespace

import adalora
import captured
import hypernetwork
import influence
import learning_rates
import maml
import merging
import per_sample_gradients
import pytest
import qlora
import quickstart
import rules
import sweep
import tokens
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


def test_quickstart(run, tiny, capsys):
    few = ["--ranks", "2", "--seeds", "0,1"]
    run(quickstart, "quickstart.png", "--model", str(tiny), *SMALL, *few)
    shown = capsys.readouterr().out
    assert "the base did not change by a bit" in shown
    assert "all 4 adapters trained in one call a step" in shown
    assert "A saved adapter came back exactly." in shown


@pytest.mark.slow
def test_variants_race(run, tiny, capsys):
    run(variants_race, "race.png", "--model", str(tiny), *SMALL)
    assert capsys.readouterr().out.count("%") == len(variants_race.VARIANTS)


def test_learning_rates(run, tiny, capsys):
    few = ["--variants", "lora,ia3,delora", "--rates", "1e-3,1e-2", "--seeds", "0,1"]
    few += ["--iterations", "2", "--batches", "1"]
    run(learning_rates, "learning_rates.png", "--model", str(tiny), *SMALL, *few)
    shown = capsys.readouterr().out
    assert "correlation of log rate and log sharpness" in shown
    assert all(name in shown for name in ("lora", "ia3", "delora"))


def test_sharpness_is_the_largest_eigenvalue(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3)).double()
    data = [(torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64))]
    members = [lf.init(model, lf.LoRA(r=1), seed=s, dtype=torch.float64) for s in range(2)]

    task = Namespace(model=model, data=data)
    options = Namespace(seed=0, batches=1, iterations=400)

    def mse(y, batch):
        return (y - batch[1]).square().mean()

    vcall = lf.vcall
    monkeypatch.setattr(
        lf, "vcall", lambda m, p, b: vcall(m, p, (b[0],), loss_fn=lambda y, _: mse(y, b))
    )
    found = learning_rates.sharpness(task, members, options)
    for one, largest in zip(members, found, strict=True):
        trained, constants = lf.partition(one)
        sizes = [leaf.numel() for leaf in trained.values()]

        def loss(flat, trained=trained, constants=constants, sizes=sizes):
            parts = [p.view_as(t) for p, t in zip(flat.split(sizes), trained.values(), strict=True)]
            leaves = dict(zip(trained, parts, strict=True))
            y = lf.fcall(model, {**leaves, **constants}, (data[0][0],))
            return mse(y, data[0])

        flat = torch.cat([leaf.detach().flatten() for leaf in trained.values()])
        eigenvalues = torch.linalg.eigvalsh(torch.func.hessian(loss)(flat))
        assert largest == pytest.approx(eigenvalues.max().item(), rel=1e-3)


def test_rules(run, tiny, capsys):
    run(rules, "rules.png", "--model", str(tiny), *SMALL)
    shown = capsys.readouterr().out
    assert all(name in shown for name in rules.NAMES)


def test_adalora(run, tiny, capsys):
    run(adalora, "adalora.png", "--model", str(tiny), *SMALL, "--r", "4", "--target-r", "1")
    assert "seed 2" in capsys.readouterr().out


def test_merging(run, tiny, capsys):
    run(merging, "merging.png", "--model", str(tiny), *SMALL, "--batches", "1")
    assert "dare_ties_svd" in capsys.readouterr().out


def test_tokens(run, capsys):
    run(tokens, "tokens.png", *SMALL, "--words", "5")
    assert "rows and LoRA" in capsys.readouterr().out


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
