"""The format of keys."""

import pytest
import torch

import lora_func as lf
from lora_func.adapter import Key, group, parse


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("model.layers.0.q.lora.A", ("model.layers.0.q", "lora", "A")),
        (".lora._scale", ("", "lora", "_scale")),
        ("*.vera._A", ("*", "vera", "_A")),
    ],
)
def test_parse(key, parts):
    assert parse(key) == parts
    assert str(Key(*parts)) == key
    assert parse(key).is_constant == parts[2].startswith("_")


@pytest.mark.parametrize("key", ["", "A", "lora.A", "site..A", "site.lora."])
def test_what_is_no_key(key):
    with pytest.raises(KeyError, match="is no adapter key"):
        parse(key)


def test_group_gives_each_site_what_its_variant_shares():
    keys = ["a.b.vera.x", "*.vera._A", "c.lora.A", "a.b.vera._s"]
    assert group(keys) == {
        ("a.b", "vera"): {"_A": "*.vera._A", "x": "a.b.vera.x", "_s": "a.b.vera._s"},
        ("c", "lora"): {"A": "c.lora.A"},
    }


def test_partition_joins_again():
    params = {"a.v.x": torch.zeros(1), "a.v._c": torch.ones(1), "*.v._d": torch.ones(2)}
    trained, constants = lf.partition(params)
    assert list(trained) == ["a.v.x"]
    assert {**trained, **constants} == params
