"""Recomputing a part of a call in the backward pass, under any transform of torch.func."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

Function: TypeAlias = Callable[..., tuple[Tensor, ...]]


def rematerialized(first: Function, again: Function, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Run a function of tensors, and keep none of its intermediate results for the backward pass.

    Args:
        first: The function; gives a tuple of tensors.
        again: The same function for repetitions, with the surroundings of the first run.
        tensors: All tensors that it depends on and that may need a derivative.

    Returns:
        The results of the function.
    """
    outputs: tuple[Tensor, ...] = _Remat.apply(first, again, *tensors)  # type: ignore[no-untyped-call]
    return outputs


class _Remat(torch.autograd.Function):
    @staticmethod
    def forward(first: Function, again: Function, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = {id(tensor) for tensor in tensors}
        # autograd cannot save an output that is an input
        return tuple(o.view_as(o) if id(o) in inputs else o for o in first(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        _, ctx.again, *tensors = inputs
        ctx.outputs = [_has_derivative(tensor) for tensor in output]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        of_wanted = _restricted(ctx.again, wanted, len(tensors))

        def pull_back(*inputs: Tensor) -> tuple[Tensor, ...]:
            fixed, cotangents = inputs[: len(tensors)], inputs[len(tensors) :]
            vjp = torch.func.vjp(of_wanted(fixed), *(fixed[i] for i in wanted))[1]
            pulled: tuple[Tensor, ...] = vjp(cotangents)
            return pulled

        floats = [gradient for gradient in gradients if _has_derivative(gradient)]
        # torch.func.grad always records the backward pass, which must keep nothing either
        pulled = dict(
            zip(wanted, rematerialized(pull_back, pull_back, [*tensors, *floats]), strict=True)
        )
        return None, None, *(pulled.get(i) for i in range(len(tensors)))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], first: Function, again: Function, *tensors: Tensor
    ) -> tuple[Sequence[Tensor], tuple[int, ...]]:
        def mapped(function: Function) -> Function:
            return torch.vmap(function, in_dims=in_dims[2:], randomness=info.randomness)

        outputs = rematerialized(mapped(first), mapped(again), tensors)
        return outputs, (0,) * len(outputs)

    @staticmethod
    def jvp(ctx: Any, _first: None, _again: None, *tangents: Tensor | None) -> Any:
        tensors = ctx.saved_tensors
        moving = {i: tangent for i, tangent in enumerate(tangents) if tangent is not None}
        of_moving = _restricted(ctx.again, [*moving], len(tensors))(tensors)
        point = tuple(tensors[i] for i in moving)
        slopes = iter(torch.func.jvp(of_moving, point, tuple(moving.values()))[1])
        return tuple(next(slopes) if differentiable else None for differentiable in ctx.outputs)


def _restricted(
    function: Function, places: Sequence[int], count: int
) -> Callable[[Sequence[Tensor]], Function]:
    """Fix all inputs except some, and keep the outputs that have derivatives."""

    def fix(tensors: Sequence[Tensor]) -> Function:
        def restricted(*moved: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(places, moved, strict=True))
            outputs = function(*(given.get(i, tensors[i]) for i in range(count)))
            return tuple(output for output in outputs if _has_derivative(output))

        return restricted

    return fix


def _has_derivative(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def surroundings(tensors: Sequence[Tensor]) -> Callable[[], AbstractContextManager[None]]:
    """Remember the current random state and autocast.

    Args:
        tensors: Tensors on the devices whose state is remembered.

    Returns:
        A context manager that restores them during a block.
    """
    devices, states = get_device_states(*tensors)
    random_state = torch.get_rng_state()
    kinds = {tensor.device.type for tensor in tensors if not tensor.is_meta} | {"cpu"}
    contexts = [
        torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=torch.is_autocast_cache_enabled(),
        )
        for kind in kinds
    ]

    @contextmanager
    def as_they_were() -> Iterator[None]:
        kind = next(iter(kinds - {"cpu"}), "cuda")
        with torch.random.fork_rng(devices=devices, device_type=kind), ExitStack() as stack:
            torch.set_rng_state(random_state)
            set_device_states(devices, states, device_type=kind)
            for context in contexts:
                stack.enter_context(context)
            yield

    return as_they_were
