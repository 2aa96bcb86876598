"""The state of a training run in a file: adapters, optimizer, step and random states."""

import random
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_func.adapter import as_trainable
from lora_func.files._adapters import check_content, facts_of
from lora_func.files._container import Content, read, write
from lora_func.runtime import devices_of
from lora_func.variant import Params

TRAINING_STATE = "training state"
"""The kind of content of these files."""


class TrainingState(NamedTuple):
    """A training run, as ``load_training_state`` reads it.

    Attributes:
        params: The adapter, or a list of them if a list was saved.
        optimizer: The argument of ``optimizer.load_state_dict``.
        step: The number of steps that were made.
        extra: Other values that were saved.
        random_states: The random states of torch (CPU and each CUDA device) and of Python.
    """

    params: Params | list[Params]
    optimizer: dict[str, Any]
    step: int
    extra: dict[str, Any]
    random_states: Mapping[str, Any]

    def restore_rng(self) -> None:
        """Restore the random states of torch and Python; NumPy's is not saved."""
        kind, words, gauss = self.random_states["python"]
        random.setstate((kind, tuple(words), gauss))
        torch.set_rng_state(self.random_states["cpu"])
        if "cuda" in self.random_states:
            torch.cuda.set_rng_state_all(self.random_states["cuda"])


def save_training_state(
    params: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    optimizer: Optimizer,
    path: str | PathLike[str],
    *,
    step: int,
    model: nn.Module | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write all that a training run needs to continue bit for bit.

    Args:
        params: The adapter, or the adapters of a sweep.
        optimizer: The optimizer of their leaves.
        path: The path of the file; its folder must exist.
        step: The number of steps that were made.
        model: The model, if the file shall recognise it.
        extra: Other values to keep: tensors, numbers, text, lists and dicts, such as a scheduler's
            state dict. Any name is kept. Tuples come back as lists.

    Raises:
        KeyError: If a key is malformed, or names no variant or nothing in the model.
        TypeError: If a leaf is not a floating-point tensor, or extra holds a value or a name
            of another type.
        ValueError: If an adapter does not fit its variants, or has no data. NaN and infinity are
            saved: training may reach them.
        OSError: If the file cannot be written.
    """
    adapters = [params] if isinstance(params, Mapping) else [*params]
    if not adapters:
        raise ValueError("params: got no adapter")
    tensors = {
        f"params.{i}.{key}": leaf for i, one in enumerate(adapters) for key, leaf in one.items()
    }
    state = _outside(optimizer.state_dict(), "optimizer", tensors)
    python = random.getstate()
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        for i, cuda in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random.cuda.{i}"] = cuda
    facts = {
        "adapters": [facts_of(one, model, allow_nonfinite=True) for one in adapters],
        "one": isinstance(params, Mapping),
        "optimizer": state,
        "step": step,
        "extra": _outside(dict(extra or {}), "extra", tensors),
        "python": python,
    }
    write(Path(path), Content(TRAINING_STATE, tensors, facts, {}))


def load_training_state(
    path: str | PathLike[str],
    *,
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
) -> TrainingState:
    """Read what ``save_training_state`` wrote.

    Args:
        path: The path of the file.
        model: The model it is for. The file is refused if it was saved with other weights.
        device: The device of the leaves; None means those of the model's sites, or the CPU without
            a model. An optimizer moves its state to the devices of its leaves.

    Returns:
        The state. Make the optimizer of ``state.params``, then ``load_state_dict(state.optimizer)``
        and ``state.restore_rng()``.

    Raises:
        FileNotFoundError: If there is no file.
        AdapterFileError: If the file is of another kind or format, is damaged, or does not fit its
            variants or the model.

    Examples:
        >>> import torch, tempfile, lora_func as lf
        >>> params = lf.init(torch.nn.Linear(4, 4), lf.LoRA(r=2))
        >>> optimizer = torch.optim.AdamW(lf.partition(params)[0].values())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lf.save_training_state(params, optimizer, f"{folder}/state", step=7)
        ...     lf.load_training_state(f"{folder}/state").step
        7
    """
    content = read(Path(path), TRAINING_STATE)
    tensors, facts, adapters = content.tensors, content.facts, []
    for leaves, of_one in zip(adapters_of(content).values(), facts["adapters"], strict=True):
        check_content(path, leaves, of_one, model)
        adapters.append(as_trainable(leaves, device or devices_of(leaves, model)))
    states: dict[str, Any] = {"cpu": tensors["random.cpu"], "python": facts["python"]}
    if cuda := _below(tensors, "random.cuda."):
        states["cuda"] = [cuda[str(i)] for i in range(len(cuda))]
    params = adapters[0] if facts["one"] else adapters
    optimizer, extra = (_inside(facts[name], tensors) for name in ("optimizer", "extra"))
    return TrainingState(params, optimizer, facts["step"], extra, states)


def adapters_of(content: Content) -> dict[str, dict[str, Tensor]]:
    """Return the leaves of each adapter in a training state, by the adapter's number."""
    count = len(content.facts["adapters"])
    return {str(i): _below(content.tensors, f"params.{i}.") for i in range(count)}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): tensor for k, tensor in tensors.items() if k.startswith(prefix)}


def _outside(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a tree of dicts and lists into a dict; the rest is JSON."""
    if isinstance(value, Tensor):
        key = f"{name}.{len(tensors)}"  # names may hold dots and look alike, numbers do not
        tensors[key] = value
        return {_TENSOR: key}
    if isinstance(value, Mapping):
        for key in value:
            for part in key if isinstance(key, tuple) else (key,):
                _check_json(f"{name}: the name {key!r}", part)
        pairs = [[key, _outside(one, f"{name}.{key}", tensors)] for key, one in value.items()]
        plain = all(isinstance(key, str) and key not in (_TENSOR, _PAIRS) for key in value)
        return dict(pairs) if plain else {_PAIRS: pairs}
    if isinstance(value, (list, tuple)):
        return [_outside(one, f"{name}.{i}", tensors) for i, one in enumerate(value)]
    _check_json(name, value)
    return value


def _check_json(where: str, value: Any) -> None:
    if not isinstance(value, (str, int, float, type(None))):
        raise TypeError(
            f"{where} is a {type(value).__name__}; accepted are tensors, numbers, text, None, and "
            "lists and dicts of these; names are numbers, text, None or tuples of these"
        )


def _inside(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_inside(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        return tensors[value[_TENSOR]]
    pairs = value[_PAIRS] if value.keys() == {_PAIRS} else value.items()
    return {
        tuple(key) if isinstance(key, list) else key: _inside(one, tensors) for key, one in pairs
    }


_TENSOR, _PAIRS = "__tensor__", "__pairs__"
