"""Each fault is named by its law, with a hint; a right variant breaks none."""

import pytest

import lora_func as lf
from lora_func.testing import LAWS, check_variant, laws
from lora_func.variants import all_variants, by_config, by_name
from tests.kit.broken import FAULTS, MISSING_LEAF, RIGHT, Broken


def test_a_right_variant_breaks_no_law():
    before = all_variants()
    report = check_variant(RIGHT, Broken(r=2), dead={"A"})
    assert not report.broken
    assert all_variants() == before
    assert len(report.verdicts) > 25


@pytest.mark.parametrize("law", FAULTS)
def test_a_fault_is_named(law):
    variant = RIGHT._replace(name="broken", **FAULTS[law])
    report = check_variant(variant, Broken(r=2), laws=[getattr(laws, law)])
    assert law in report.broken
    assert "NO" in str(report)
    assert "hint" in str(report)


def test_a_leaf_that_leaves_does_not_name():
    (example,) = check_variant(MISSING_LEAF, Broken(r=2), laws=LAWS[:1]).broken.values()
    assert "B: missing has no such leaf, but ['A']" in example.error


def test_a_counterexample_is_small_and_says_sizes_and_seed():
    variant = RIGHT._replace(name="broken", **FAULTS["weight_view_is_the_activation_view"])
    drawn = check_variant(variant, Broken(r=2)).broken["weight_view_is_the_activation_view"].drawn
    assert drawn.startswith("d_in=1, d_out=1, r=1, bias=False, batch=(), seed=0")


def test_sizes_that_a_config_accepts_are_found():
    for cfg in (lf.OFT(block_size=8), lf.HRA(r=2), lf.SHiRA(r=1)):
        variant = by_config(cfg)
        start = "close" if variant.name == "hra" else "exact"
        report = check_variant(variant, cfg, start=start, examples=2)
        assert not report.broken, str(report)


def test_a_config_for_which_no_sizes_are_found():
    with pytest.raises(ValueError, match="no sizes were found that the method accepts"):
        check_variant(by_name("oft"), lf.OFT(block_size=97))
