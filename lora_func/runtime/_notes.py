"""Notes on errors of torch that do not say where they arose."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lora_func.compat import active_transforms


@contextmanager
def noted(model: nn.Module) -> Iterator[None]:
    """Add a note to an error of torch under vmap: the module, and the way that works."""
    try:
        yield
    except RuntimeError as error:
        if not torch.compiler.is_compiling() and "Vmap" in active_transforms():
            error.add_note(
                f"in {_running(model, error)}, under torch.vmap; vcall(model, stacked, batch) "
                f"gives the same numbers without vmap{_advice(str(error))}"
            )
        raise


def _advice(message: str) -> str:
    """What else helps against an error of torch, by its message."""
    if "dtype" in message:
        return ', and so does vmap with attn_implementation="eager", which casts under autocast'
    if "broadcast shape" in message or "in-place" in message or "inplace" in message:
        return ", and so does vmap with an out-of-place operation here"
    return ""


def _running(model: nn.Module, error: BaseException) -> str:
    """Name the innermost module of a model that was running when an error arose."""
    names = {id(module): path for path, module in model.named_modules()}
    found = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    running = [module for module in found if isinstance(module, nn.Module) and id(module) in names]
    module = running[-1] if running else model
    return f"{names[id(module)] or 'the model'} ({type(module).__name__})"
