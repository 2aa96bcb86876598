"""PEFT's name for the task of a model, by which its Auto classes choose."""

import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The modules that PEFT keeps whole for a task, whatever the config says."""

_MAPPINGS = {
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "SEQ_CLS",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "TOKEN_CLS",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "QUESTION_ANS",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "SEQ_2_SEQ_LM",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "CAUSAL_LM",
    "MODEL_MAPPING_NAMES": "FEATURE_EXTRACTION",
}
TASKS = (None, *dict.fromkeys(_MAPPINGS.values()))


def task_of(model: nn.Module) -> str | None:
    """Infer the task of a model from its class; None if transformers lists it under none."""
    auto = sys.modules.get("transformers.models.auto.modeling_auto")
    classes = {kind.__name__ for kind in type(model).__mro__}
    for mapping, task in _MAPPINGS.items():
        if classes & {*_names(getattr(auto, mapping, {}).values())}:
            return task
    return None


def _names(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        yield from (value,) if isinstance(value, str) else value


def hidden_by_head(task: str | None, paths: Iterable[str]) -> str | None:
    """Return a path at which PEFT ignores an adapter: it keeps that module whole for the task."""
    heads = HEADS.get(task or "", ())
    return next((p for p in paths for h in heads if re.match(rf"(^|.*\.){h}($|\..*)", p)), None)


def head_paths(model: nn.Module, task: str | None) -> dict[str, nn.Module]:
    """Return the modules that PEFT keeps whole for a task, by their paths."""
    heads = HEADS.get(task or "", ())
    return {path: m for path, m in model.named_modules() if heads and path.endswith(heads)}


def head_parameters(model: nn.Module, task: str | None) -> dict[str, Tensor]:
    """Return copies of the parameters that PEFT expects in a checkpoint for a task."""
    return {
        name: tensor.detach().cpu().clone()
        for path, module in head_paths(model, task).items()
        for name, tensor in module.state_dict(prefix=f"{path}.").items()
    }
