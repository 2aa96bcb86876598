"""Every private name of torch, transformers, accelerate and bitsandbytes that is used here.

No other file may use such a name, which may change in any release. Each function says why there is
no public way; a canary in ``tests/test_compat.py`` fails when a new release changes the name.
"""

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils.checkpoint import checkpoint

tree_flatten, tree_unflatten = _pytree.tree_flatten, _pytree.tree_unflatten
tree_map, tree_map_only, tree_leaves = _pytree.tree_map, _pytree.tree_map_only, _pytree.tree_leaves
tree_flatten_with_path, name_of_path = _pytree.tree_flatten_with_path, _pytree.keystr

# ---------------------------------------------------------------------------- transforms of torch


def active_transforms() -> list[str]:
    """Return the torch.func transforms around this call, outermost first: "Grad", "Vmap", "Jvp"."""
    stack = torch._C._functorch.get_interpreter_stack()
    return [] if stack is None else [level.key().name for level in stack]


def in_forward_mode() -> bool:
    """True if a jvp is running, of torch.func or of torch.autograd.forward_ad."""
    return torch.autograd.forward_ad._current_level >= 0


def transformed() -> bool:
    """True if any transform is active, also while compiling."""
    return bool(active_transforms()) or in_forward_mode()


def needs_math() -> bool:
    """True if a transform is active for which fused kernels have no rule."""
    kinds = active_transforms()
    return "Vmap" in kinds or in_forward_mode() or kinds.count("Grad") > 1


for _constant in (needs_math, transformed):
    # torch.compiler.assume_constant_result does the same, and imports the compiler
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_wrapped(tensor: Tensor) -> bool:
    """True if a tensor belongs to a torch.func transform, and dies with it."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor one transform below."""
    return torch._C._functorch.get_unwrapped(tensor)


def is_alive(tensor: Tensor) -> bool:
    """True if the transform that a tensor belongs to is still running."""
    level = torch._C._functorch.maybe_current_level() or 0
    # -2 is the level of a transform that has ended
    return torch._C._functorch.maybe_get_level(tensor) in range(-1, 1 + level)


def autocasts(tensor: Tensor) -> bool:
    """True if autocast chooses the dtypes of products on a tensor's device."""
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


current_mode: Callable[[], Any] = torch.overrides._get_current_function_mode
pop_mode: Callable[[], Any] = torch.overrides._pop_mode
push_mode: Callable[[Any], None] = torch.overrides._push_mode
"""The stack of torch function modes, from which one is taken where it has nothing to see."""

# ------------------------------------------------------------------------------- tensors of torch


def identity_of(tensor: Tensor) -> int:
    """Return the identity of a tensor's C++ object, which several Python objects may share."""
    return tensor._cdata


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to in place."""
    return 0 if tensor.is_inference() else tensor._version


def versions_kept(tensors: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Keep the versions of tensors that are written with their own numbers: graphs hold them."""
    versioned = tuple(tensor for tensor in tensors if not tensor.is_inference())
    return torch.autograd.grad_mode._unsafe_preserve_version_counter(versioned)


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors of the same shapes and dtypes in one kernel; torch has no public name for it."""
    if targets:
        torch._foreach_copy_(targets, sources)


def written_arguments(operation: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments that an operation writes to, which only its schema says."""
    schema = operation._schema.arguments
    given = {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs
    written = [a.name for a in schema if a.alias_info is not None and a.alias_info.is_write]
    return [given[name] for name in written if name in given]


def reshape_unsafe(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshape an autograd function's output; a public view of it cannot be written to in place."""
    return cast(Tensor, torch.ops.aten._unsafe_view.default(y, shape))


def without_torch_function() -> AbstractContextManager[Any]:
    """Return a context in which tensor subclasses act as tensors; torch documents the name."""
    return torch._C.DisableTorchFunctionSubclass()


def gradient_of_entries(gradient: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute ``Σ_n gradient[row, n] x[column, n]`` for each entry, without a dense matrix.

    Args:
        gradient: Shape (d_out, n).
        x: Shape (d_in, n).
        rows: Shape (nnz,).
        columns: Shape (nnz,).

    Returns:
        Shape (nnz,). No public operation gives single entries of a product.
    """
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return cast(Tensor, backward(gradient, x, columns, rows, rows, 0))


# ------------------------------------------------------------------------------- modules of torch


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """Return the dict of a module's own parameters, with None; a scripted module gives a copy."""
    own: Any = module.__dict__.get("_parameters")
    return own if isinstance(own, dict) else dict(module.named_parameters(recurse=False))


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the dict in which a module keeps its children; a scripted module gives a copy."""
    own: Any = module.__dict__.get("_modules")
    return own if isinstance(own, dict) else dict(module.named_children())


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dict in which a module keeps its own buffers."""
    own = module._buffers
    return own if isinstance(own, dict) else dict(module.named_buffers(recurse=False))


def forward_hooks_of(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """Return a module's forward hooks by their number; torch has no public list of them."""
    return module._forward_hooks


PARAMETERS, CHILDREN = "_parameters", "_modules"
HOOKS, PRE_HOOKS, STATE_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks"
"""The attributes of a module that hold its parameters, children and hooks."""
IS_PARAMETER = "_is_param"
"""The attribute by which ``isinstance`` takes a subclass of Tensor for an ``nn.Parameter``."""

CACHED_WEIGHTS = ("_flat_weights", "_flat_weight_refs")
"""Where torch's recurrent layers remember the tensors that their last call used."""


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile(model)`` wraps; any other module as it is."""
    original = vars(model).get(CHILDREN, {}).get("_orig_mod", model)
    assert isinstance(original, nn.Module)
    return original


def is_convolution(module: nn.Module) -> bool:
    """True for convolutions, except transposed ones; their common base class is private."""
    return isinstance(module, _ConvNd) and not is_transposed_convolution(module)


def is_transposed_convolution(module: nn.Module) -> bool:
    """True for transposed convolutions; their common base class is private."""
    return isinstance(module, _ConvTransposeNd)


def convolve(module: nn.Module, image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run a convolution with another weight: its padding mode is applied only in this method."""
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor] = module._conv_forward  # type: ignore[assignment]
    return run(image, weight, bias)


def mixes_rows_in_training(module: nn.Module) -> bool:
    """True for BatchNorm of any kind; their common base class is private."""
    return isinstance(module, _BatchNorm)


torch_checkpoint: Any = checkpoint.__wrapped__  # type: ignore[attr-defined]
"""What is behind ``torch.utils.checkpoint.checkpoint``, which other modules bind by name; it looks
up what it calls in ``CHECKPOINT_PATCH`` each time."""
CHECKPOINT_PATCH = (vars(torch_checkpoint), "__dynamo_disable")


# ----------------------------------------------------------------------- transformers, accelerate


OLD_FORWARD, HF_HOOK = "_old_forward", "_hf_hook"
"""Where accelerate keeps a module's forward while a hook stands in its place, and that hook."""


def inner_forward_cell(forward: Any) -> Any:
    """Return the cell in which transformers' tensor parallelism keeps a module's own forward."""
    if not getattr(forward, "__qualname__", "").endswith("install_forward.<locals>.tp_forward"):
        return None
    return forward.__closure__[forward.__code__.co_freevars.index("original_forward")]


def masking_module() -> Any:
    """Return the module, if imported, whose ``is_tracing`` says not to look into a mask."""
    return sys.modules.get("transformers.masking_utils")


EXPERTS_SETTING = "_experts_implementation_internal"
"""The attribute of a transformers config that names the implementation of experts."""


def makes_inputs_require_grad(hook: Callable[..., Any]) -> bool:
    """True for the hook that transformers installs with checkpointing; no transform allows it."""
    return getattr(hook, "__name__", "") == "make_inputs_require_grads"


def is_cache(value: object) -> bool:
    """True for transformers' caches of keys and values, found by name."""
    return type(value).__module__.startswith("transformers.cache_utils")


# ------------------------------------------------------------------------------------ bitsandbytes

BITSANDBYTES_LAYERS = ("bitsandbytes.nn.modules", ("Linear4bit", "Linear8bitLt"))
BITSANDBYTES_STATES = ("QuantState", "MatmulLtState")
REPACKED_FOR_CPU = "packing_format_for_cpu"
"""Modules, classes and flags of bitsandbytes, which are recognised by name and never imported."""
