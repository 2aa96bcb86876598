"""Modules of other packages against the laws: a right one, wrong ones, and PEFT's."""

import copy

import peft_laws
import pytest
import torch
from torch import nn

from lora_func.testing import check_foreign, laws


class Right(nn.Module):
    """W' = W + B A as a module around a layer."""

    def __init__(self, layer, r):
        super().__init__()
        self.layer = layer
        self.A = nn.Parameter(torch.randn(r, layer.in_features, dtype=layer.weight.dtype))
        self.B = nn.Parameter(torch.zeros(layer.out_features, r, dtype=layer.weight.dtype))

    def forward(self, x):
        y = self.layer(x)
        with torch.autocast("cpu", enabled=False):
            change = x.to(self.A.dtype) @ self.A.mT @ self.B.mT
        return y + change.to(y.dtype)

    def merged(self):
        layer = copy.deepcopy(self.layer)
        layer.weight.add_((self.B @ self.A).to(layer.weight.dtype))
        return layer


class Drifting(Right):
    def forward(self, x):
        with torch.no_grad():
            self.A.add_(1e-3)
        return super().forward(x)


class Summing(Right):
    def forward(self, x):
        return super().forward(x) + self.B.sum().to(x.dtype)


class Double(Right):
    def merged(self):
        layer = super().merged()
        layer.weight.add_((self.B @ self.A).to(layer.weight.dtype))
        return layer


def test_a_right_module_breaks_no_law():
    report = check_foreign(Right, merged=Right.merged, dead={"A"})
    assert not report.broken, str(report)
    checked = {str(verdict.law) for verdict in report.verdicts}
    assert checked == {law.name for law in laws.LAWS if law.foreign}


def test_laws_of_the_weight_view_need_a_way_to_merge():
    report = check_foreign(Double, examples=2)
    assert not report.broken, str(report)
    assert "weight_view_is_the_activation_view" not in {str(v.law) for v in report.verdicts}


@pytest.mark.parametrize(
    ("module", "law"),
    [
        (Drifting, "nothing_that_goes_in_is_written_to"),
        (Summing, "weight_view_is_the_activation_view"),
        (Double, "weight_view_is_the_activation_view"),
    ],
)
def test_a_fault_is_named(module, law):
    assert law in check_foreign(module, merged=module.merged, name=module.__name__).broken


@pytest.mark.parametrize(
    ("method", "law"),
    [
        ("DeLoRA", "first_step_follows_the_learning_rate"),
        ("DoRA", "zero_rows_stay_finite"),
        ("HRA, `apply_GS`", "start_is_the_base"),
        ("C3A", "gradients_are_those_of_finite_differences"),
    ],
)
def test_what_is_known_of_peft_is_found(method, law):
    found = peft_laws.report(method, laws=[getattr(laws, law)])
    assert [*found.broken] == [law]


def test_no_sizes():
    def factory(layer, r):
        raise TypeError("never")

    with pytest.raises(ValueError, match=r"no sizes were found that the method accepts.*never"):
        check_foreign(factory)
