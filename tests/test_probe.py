"""The probe with small settings, on a tiny model saved in a folder."""

import probe
import pytest
import torch

import lora_func as lf


def run(tiny, tmp_path, *arguments):
    small = ["--model", str(tiny), "--packages", "3", "--most", "40", "--length", "16"]
    rest = ["--batch-size", "8", "--epochs", "3", "--plot", str(tmp_path / "probe.png")]
    return probe.main([*small, *rest, *arguments])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "variants"),
    [("classify", "all"), ("generate", "head,eva-rho2,hra,vera,ssteer-add,shira-snip")],
)
def test_every_check_passes(tiny, tmp_path, capsys, task, variants):
    assert run(tiny, tmp_path, "--variants", variants, "--task", task) == 0
    shown = capsys.readouterr()
    assert "passed" in shown.out
    assert "failed" not in shown.out
    assert (tmp_path / "probe.png").stat().st_size > 10_000


def broken_gradient(monkeypatch):
    """The optimizer does nothing, so the adapter stays untrained."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)


def broken_target(monkeypatch):
    """The config misses the query layers."""
    entry = probe.Entry(lf.LoRA, lf.Trial({"exclude_modules": "query"}))
    monkeypatch.setitem(probe.VARIANTS, "lora", entry)


def broken_start(monkeypatch):
    """The initial adapter changes the base model's output."""
    init = lf.init

    def shifted(*args, **kwargs):
        params = init(*args, **kwargs)
        return {k: (v + 0.1).detach().requires_grad_(v.requires_grad) for k, v in params.items()}

    monkeypatch.setattr(lf, "init", shifted)


@pytest.mark.parametrize(
    ("breaks", "complaint"),
    [
        (broken_gradient, "leaves that never moved"),
        (broken_target, "targets differ"),
        (broken_start, "the start is not the base model"),
    ],
)
def test_a_dead_adapter_fails(tiny, tmp_path, capsys, monkeypatch, breaks, complaint):
    breaks(monkeypatch)
    assert run(tiny, tmp_path, "--variants", "lora") == 1
    assert f"lora: {complaint}" in capsys.readouterr().err


def test_an_unknown_variant_is_refused(capsys):
    with pytest.raises(SystemExit):
        probe.main(["--variants", "lora,nothing"])
    assert "no variants ['nothing']; there are head, " in capsys.readouterr().err
