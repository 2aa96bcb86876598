"""EVA compared with a principal component analysis, and with PEFT."""

import peft
import pytest
import torch
from peft.tuners.lora.eva import get_eva_state_dict
from torch import nn

import lora_func as lf
from tests.support.models import make


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(20, 12), nn.Linear(20, 8), nn.Linear(12, 9)

    def forward(self, x):
        return self.c(self.a(x).tanh()), self.b(x)


def inputs(batches=3, rows=40):
    torch.manual_seed(0)
    mix = torch.randn(20, 20, dtype=torch.float64) * 0.7 ** torch.arange(20)[:, None]
    return [torch.randn(rows, 20, dtype=torch.float64) @ mix + 5 for _ in range(batches)]


@pytest.mark.parametrize("center", [True, False])
def test_a_spans_the_principal_components_of_all_the_data(center):
    model, data = Model().double(), inputs()
    params = lf.init(model, lf.EVA(r=4, center=center), data=data, dtype=torch.float64)
    x = torch.cat(data)
    for site, rows in (("a", x), ("b", x), ("c", model.a(x).tanh().detach())):
        A = params[f"{site}.eva.A"].detach()
        _, _, Vh = torch.linalg.svd(rows - rows.mean(0) if center else rows, full_matrices=False)
        torch.testing.assert_close(A.abs(), Vh[:4].abs(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(A @ A.T, torch.eye(4, dtype=torch.float64))
        assert (A.gather(1, A.abs().argmax(1, keepdim=True)) > 0).all()
        assert not params[f"{site}.eva.B"].any()
    assert torch.equal(params["a.eva.A"], params["b.eva.A"])


def test_sites_that_part_ways_keep_their_own_components():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, x, y):
            return self.a(x) + self.b(x if y is None else y)

    first, second, other = inputs()
    data = [(first, None), (second, other), (first, None)]
    params = lf.init(Two().double(), lf.EVA(r=4), data=data, dtype=torch.float64)
    for site, batches in (("a", (first, second, first)), ("b", (first, other, first))):
        x = torch.cat(batches)
        _, _, Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        torch.testing.assert_close(
            params[f"{site}.eva.A"].detach().abs(), Vh[:4].abs(), rtol=1e-6, atol=1e-6
        )


def test_an_outlier_does_not_hide_the_rest():
    """A float32 scatter matrix would lose the other components to rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    x = torch.randn(500, 64) * torch.linspace(2, 0.5, 64)
    x[:, 7] *= 1000
    A = lf.init(model, lf.EVA(r=8), data=[x])["0.eva.A"].detach().double()
    _, _, Vh = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)
    assert torch.linalg.svdvals(A @ Vh[:8].T).min() > 0.999


def test_the_order_and_the_size_of_batches_do_not_matter():
    model, data = Model().double(), inputs()
    split = [part for batch in reversed(data) for part in batch.split(7)]
    one, other = (lf.init(model, lf.EVA(r=4), data=d, dtype=torch.float64) for d in (data, split))
    for key in one:
        torch.testing.assert_close(one[key], other[key])


def test_ranks_go_to_where_they_explain_most():
    model, data = Model().double(), inputs()
    model.c.weight.data.zero_()
    cfg = lf.EVA(r=4, alpha=6.0, rho=2.0)
    params = lf.init(model, cfg, data=data, dtype=torch.float64)
    ranks = {site: len(params[f"{site}.eva.A"]) for site in "abc" if f"{site}.eva.A" in params}
    assert sum(ranks.values()) == 12
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    assert all(params[f"{site}.eva._scale"] == 1.5 for site in ranks)

    x = torch.cat(data)
    shares = []
    for site, rows in (("a", x), ("b", x), ("c", model.a(x).tanh().detach())):
        variance = torch.linalg.svdvals(rows - rows.mean(0)) ** 2
        shares += [(share.item(), site) for share in (variance / variance.sum())[:8]]
    kept = [site for _, site in sorted(shares, key=lambda share: -share[0])[:12]]
    assert ranks == {site: kept.count(site) for site in "abc" if site in kept}


def test_a_site_may_end_without_a_rank():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.steep = nn.Linear(30, 30), nn.Linear(30, 30)

        def forward(self, flat, steep):
            return self.flat(flat) + self.steep(steep)

    narrow = torch.cat([torch.randn(64, 2), torch.zeros(64, 28)], 1)
    data = [{"flat": torch.randn(64, 30), "steep": narrow}]
    params = lf.init(Two(), lf.EVA(r=1, rho=2), data=data)
    assert {key.split(".")[0] for key in params} == {"steep"}
    assert params["steep.eva.A"].shape == (2, 30)


@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.filterwarnings("ignore")
def test_parity_with_peft(rho):
    """A steep input spectrum, so that PEFT's randomised SVD finds the same components."""

    def steep():
        model = make("qwen3")
        model.model.embed_tokens.weight.data *= 0.7 ** torch.arange(32)
        return model

    model = steep()
    ids = torch.randint(1, 64, (16, 24))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = peft.LoraConfig(
        r=4,
        lora_alpha=4,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho, use_label_mask=False),
        target_modules=["q_proj", "k_proj", "gate_proj"],
    )
    theirs = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    state = get_eva_state_dict(theirs, [batch], show_progress_bar=False)
    theirs = {key.removeprefix("base_model.model."): A for key, A in state.items()}
    theirs = {key.removesuffix(".lora_A.weight"): A for key, A in theirs.items()}
    model = steep()
    cfg = lf.EVA(r=4, alpha=4, rho=rho, target_modules=r"(q|k|gate)_proj$")
    params = lf.init(model, cfg, data=[batch])
    ours = {k.removesuffix(".eva.A"): v.detach() for k, v in params.items() if k.endswith("eva.A")}
    assert {site: len(A) for site, A in ours.items()} == {s: len(A) for s, A in theirs.items()}
    for site, A in theirs.items():
        products = ours[site].double() @ A.T.double()
        assert torch.linalg.svdvals(products).min() > 0.999, site
        assert products[0, 0] > 0.999, site


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rho": 0.5}, ValueError, r"rho: got 0\.5, expected at least 1"),
        ({"rho": "2"}, ValueError, "rho: got '2', expected a finite number"),
        ({"center": 1}, TypeError, "center: got 1, expected True or False"),
        ({"r": 0}, ValueError, "r: got 0, expected an integer of at least 1"),
    ],
)
def test_refuses(settings, error, message):
    with pytest.raises(error, match=message):
        lf.EVA(**settings)


def test_refuses_at_init():
    model, data = Model().double(), inputs(rows=2)
    for cfg, given, message in (
        (lf.EVA(r=4), None, "a: eva: needs calibration data; pass init"),
        (lf.EVA(r=6), data, "a: eva: saw 6 tokens of data, needs at least 7; pass more batches"),
        (lf.EVA(r=9), inputs(), r"b: eva: r = 9 exceeds min\(d_out, d_in\) = 8"),
        (lf.EVA(r=4), [torch.ones(50, 20).double()], "a: eva: its inputs span fewer than r = 4"),
        (lf.EVA(r=4), [torch.full((9, 20), torch.nan).double()], "a: eva: its inputs hold NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            lf.init(model, cfg, data=given)
