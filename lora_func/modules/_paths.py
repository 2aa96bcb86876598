"""Paths: of modules, of parameters, of an attached adapter, and inside of torch's wrappers."""

import warnings
from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor, nn

from lora_func.compat import parameters_of, uncompiled
from lora_func.modules._tracking import AttachedView


def find_site(model: nn.Module, path: str) -> tuple[nn.Module, str | None]:
    """Find the module or parameter that a path names.

    Args:
        model: The model.
        path: Path of a module or of a parameter.

    Returns:
        The module and None; or the module that holds the parameter, and the parameter's name there.

    Raises:
        KeyError: If the model has neither.
    """
    try:
        return model.get_submodule(path), None
    except AttributeError:
        parent, _, name = path.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        module = None
    if module is None or parameters_of(module).get(name) is None:
        raise KeyError(f"the model has no module and no parameter {path!r}")
    return module, name


def attached_path(model: nn.Module) -> str | None:
    """Return the path of a module that has an adapter attached; None if there is none."""
    found = (path for path, m in model.named_modules() if isinstance(m, AttachedView))
    path = next(found, None)
    return None if path is None else path.partition("parametrizations.")[0].removesuffix(".")


def called_model(model: nn.Module) -> nn.Module:
    """Return the module to call: data parallelism serves the module's own gradients alone."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and dist.get_world_size() > 1:
        warnings.warn(
            "DistributedDataParallel around the base does not average the gradients of an adapter; "
            "give fcall and vcall lora_func.distributed.synced(params)",
            stacklevel=2,
        )
    return _without_data_parallelism(model)


def _without_data_parallelism(model: nn.Module) -> nn.Module:
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


def inner_model(model: nn.Module) -> nn.Module:
    """Return the model inside of torch's wrappers, whose paths are those of an adapter's keys."""
    inner = _without_data_parallelism(uncompiled(model))
    return model if inner is model else inner_model(inner)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter of each module; a tied parameter once for each of its places."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in parameters_of(module).items():
            if parameter is not None:
                yield prefix + name, parameter
