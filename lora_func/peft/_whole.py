"""Parameters that a checkpoint holds whole: heads, biases, norms, and embeddings of the base."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_func.adapter import Key, parse
from lora_func.compat import buffers_of
from lora_func.modules import find_site, original_parameters, shared_parameters
from lora_func.peft._checkpoint import BASE
from lora_func.peft._formats import is_saved
from lora_func.peft._task import hidden_by_head
from lora_func.variant import Params
from lora_func.variants import full

FULL = full.VARIANT.name


def whole_parameters(
    config: Mapping[str, Any],
    model: nn.Module,
    peft_path: str,
    path: str,
    tensors: Mapping[str, Tensor],
) -> Params:
    """Read the tensors of a module that are no leaves of an adapter.

    Args:
        config: The config.
        model: The model.
        peft_path: The module's path in the checkpoint's names.
        path: The module's path in the model.
        tensors: The rest of the name -> tensor.

    Returns:
        The parameters that are trained themselves; none for those of the base.

    Raises:
        KeyError: If the model has no such module.
        ValueError: If a tensor is of a buffer, of another base, or of no kind that is known.
    """
    module, _ = find_site(model, path)
    own, found = original_parameters(module), Params()
    for rest, tensor in tensors.items():
        name = rest.removeprefix(f"{BASE}.")
        check_no_buffer(path, module, name)
        if own.get(name) is None:
            raise ValueError(
                f"{path}: the checkpoint holds {rest!r}, which is no tensor of a "
                f"{config['peft_type']} and no parameter of a {type(module).__name__}"
            )
        tied = _tied_paths(model, module, name) if config.get("ensure_weight_tying") else []
        if _is_trained(config, peft_path, rest) or any(is_saved(config, one) for one in tied):
            found[str(Key(path, FULL, name))] = tensor
        elif hidden_by_head(config.get("task_type"), [peft_path]):
            # a head that nobody trained is the model's own
            if own[name].shape != tensor.shape or not _is_equal(own[name], tensor):
                found[str(Key(path, FULL, name))] = tensor
        elif name == "weight" and (rest != name or _is_embedding(model, module)):
            _check_base(f"{path}.{name}", own[name], tensor)
        else:
            raise ValueError(
                f"{path}: the checkpoint holds {rest!r}, which modules_to_save = "
                f"{config.get('modules_to_save')} and bias = {config.get('bias')!r} do not name"
            )
    return found


def check_no_buffer(path: str, module: nn.Module, name: str) -> None:
    """Check that a tensor of a checkpoint is no buffer, such as a running mean.

    Raises:
        ValueError: If it is one.
    """
    if name in buffers_of(module):
        raise ValueError(
            f"{path}.{name}: PEFT saved this buffer with its module, and training changes it; an "
            "adapter holds parameters alone: copy the buffers into the model, and leave "
            f"{[*buffers_of(module)]} out of the file"
        )


def _is_trained(config: Mapping[str, Any], peft_path: str, rest: str) -> bool:
    bias = config.get("bias") or "none"
    if rest == f"{BASE}.bias":
        return bool(bias != "none")
    return (rest == "bias" and bias == "all") or is_saved(config, peft_path)


def _tied_paths(model: nn.Module, module: nn.Module, name: str) -> list[str]:
    names = {one: path for path, one in model.named_modules()}
    return [names[one] for one, _ in shared_parameters(model)[module, name]]


def _is_equal(own: Tensor, tensor: Tensor) -> bool:
    return torch.equal(own.detach().cpu(), tensor.to(own.dtype))


def _is_embedding(model: nn.Module, module: nn.Module) -> bool:
    getters = ("get_input_embeddings", "get_output_embeddings")
    ends = [getter() for name in getters if callable(getter := getattr(model, name, None))]
    return isinstance(module, nn.Embedding) or any(module is end for end in ends)


def _check_base(name: str, own: Tensor, tensor: Tensor) -> None:
    """Check that a weight of the base that PEFT saved is the model's."""
    if own.shape != tensor.shape:
        raise ValueError(
            f"{name}: has shape {tuple(own.shape)} in the model and {tuple(tensor.shape)} in the "
            "checkpoint; call resize_token_embeddings first, and load this weight into the model"
        )
    if not _is_equal(own, tensor):
        raise ValueError(
            f"{name}: the checkpoint holds another weight than the model, both of shape "
            f"{tuple(own.shape)}; load the checkpoint's into the model first"
        )


def tied_once(model: nn.Module, params: Params) -> Params:
    """Keep one of the copies of a tied parameter, if they are equal; PEFT trains each copy.

    Args:
        model: The model.
        params: The adapter, possibly with a leaf for each place.

    Returns:
        The adapter with one leaf for each parameter.

    Raises:
        ValueError: If the places of a tied parameter are not all there, or not equal.
    """
    places, names = shared_parameters(model), {id(m): name for name, m in model.named_modules()}
    kept = dict(params)
    for key in params:
        path, variant, leaf = parse(key)
        if variant != FULL or key not in kept:
            continue
        here = model.get_submodule(path), leaf
        others = [str(Key(names[id(m)], FULL, n)) for m, n in places[here]]
        if any(o not in params or not torch.equal(params[o], params[key]) for o in others):
            raise ValueError(
                f"{path}.{leaf}: is tied in the model, and {others} in the checkpoint are not all "
                "there, or not equal; untie them in the model first"
            )
        for other in others[1:]:
            kept.pop(other, None)
    return kept
