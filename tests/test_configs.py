"""Configs are values: deeply frozen, hashable, and stored as given."""

import copy
import json
import pickle
from dataclasses import asdict

import pytest

import lora_func as lf


def test_what_the_caller_changes_later_does_not_reach_the_config():
    names, ranks = ["q"], {"q": 2}
    cfg = lf.LoRA(target_modules=names, rank_pattern=ranks)
    names.append("v")
    ranks["v"] = 4
    assert cfg.target_modules == ("q",)
    assert cfg.rank_pattern == {"q": 2}


def test_patterns_cannot_be_changed():
    cfg = lf.LoRA(rank_pattern={"q": 2})
    for change in (
        lambda table: table.__setitem__("v", 1),
        lambda table: table.update(v=1),
        lambda table: table.pop("q"),
        lambda table: table.clear(),
    ):
        with pytest.raises(TypeError, match="cannot be changed; make another one"):
            change(cfg.rank_pattern)


@pytest.mark.parametrize(
    "cfg",
    [
        lf.LoRA(target_modules=["q", "v"], layers=[0, -1], rank_pattern={"q": 2}),
        lf.Full(target_parameters=["bias"]),
        lf.SSteer(target_roles=["reader"]),
    ],
)
def test_configs_hash_copy_pickle_and_go_through_json(cfg):
    for again in (copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert again == cfg
        assert hash(again) == hash(cfg)
    settings = json.loads(json.dumps(asdict(cfg)))
    assert type(cfg)(**settings) == cfg
