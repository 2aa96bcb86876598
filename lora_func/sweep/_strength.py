"""The strength at which an adapted model is a given distance from its base."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_func.adapter import as_trainable, group, stack, unstack
from lora_func.checks import check_number
from lora_func.runtime import arguments, stack_size
from lora_func.sweep._sweep import vcall
from lora_func.variant import Params

_HALVINGS = 60
"""Enough to find a number to the last bit of float32."""


def calibrate_strength(
    model: nn.Module,
    params: Mapping[str, Tensor],
    data: Iterable[Any],
    *,
    target_kl: float,
    tol: float = 0.01,
    most: float = 2.0**20,
) -> tuple[Params, Tensor]:
    """Scale adapters so that the model's outputs are as far from the base's as asked for.

    The strength multiplies the coefficient (``_coeff``) of each site, or its scale (``_scale``). It
    is doubled from 1 on until the distance is reached, and then found by bisection, for K adapters
    at once. The distance is the mean over all tokens of KL(base ‖ adapted), in nats; tokens that
    ``attention_mask`` of a mapping pads are left out. Where it does not grow steadily, one of the
    strengths at which it is reached is found.

    Args:
        model: The model, in eval mode, whose output or ``output.logits`` are logits (..., classes).
        params: An adapter, or a stack.
        data: Batches as for ``fcall``; all of them are kept, with the base's logits.
        target_kl: The distance, above 0.
        tol: How near the distance must come, as a part of it.
        most: The largest strength that is tried.

    Returns:
        (params, strength): the adapter with other coefficients, and the strength; (K,) of a stack.

    Raises:
        TypeError: If data is a single batch, or an output has no logits.
        ValueError: If the model is in training mode, there is no data, a site has neither a
            coefficient nor a scale, or no strength reaches the distance.

    Examples:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 5)).eval()
        >>> params = lf.init(model, lf.LoRA(r=2, start="gaussian"))
        >>> params["0.lora.B"] = torch.randn(5, 2)
        >>> data = [torch.randn(8, 4)]
        >>> stronger, strength = lf.calibrate_strength(model, params, data, target_kl=0.1)
        >>> bool(stronger["0.lora._scale"] == strength * params["0.lora._scale"])
        True
    """
    for name, value in (("target_kl", target_kl), ("tol", tol), ("most", most)):
        check_number(name, value, above=0)
    if isinstance(data, (Mapping, Tensor)) or not isinstance(data, Iterable):
        raise TypeError(f"data: got one {type(data).__name__}, expected an iterable of batches")
    if model.training:
        raise ValueError("model: is in training mode, where dropout moves the outputs; call eval()")
    k = stack_size(model, params)
    members = dict(params) if k is not None else stack([params])
    keys = _coefficients(members)
    if all(not members[key].any() for key in keys):
        raise ValueError("params: every coefficient is zero, and no strength changes it")
    with torch.no_grad():
        base = [(batch, _log_probabilities(_call(model, batch))) for batch in data]
        if not base:
            raise ValueError("data: got no batch")

        def distance(strength: Tensor) -> Tensor:
            return _distance(model, _scaled(members, keys, strength), base)

        strength = _solved(distance, k or 1, target_kl, tol, most)
        found = as_trainable(_scaled(members, keys, strength))
    if k is not None:
        return found, strength
    (single,) = unstack(found)
    return as_trainable(single), strength[0]


def _coefficients(params: Mapping[str, Tensor]) -> list[str]:
    keys = []
    for (site, name), leaves in group(params).items():
        key = leaves.get("_coeff", leaves.get("_scale"))
        if key is None:
            raise ValueError(
                f"{site}: {name} has neither a coefficient nor a scale that a strength could "
                "multiply; leave the site out"
            )
        keys.append(key)
    return keys


def _scaled(params: Mapping[str, Tensor], keys: Iterable[str], strength: Tensor) -> Params:
    made = {}
    for key in keys:
        leaf = params[key].detach()
        made[key] = leaf * strength.reshape(-1, *[1] * (leaf.ndim - 1)).to(leaf)
    return {**params, **made}


def _call(model: nn.Module, batch: Any) -> Any:
    args, kwargs = arguments(batch)
    return model(*args, **kwargs)


def _log_probabilities(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    is_tensor = isinstance(logits, Tensor) and logits.is_floating_point()
    if not is_tensor or not logits.ndim or logits.shape[-1] < 2:
        found = tuple(logits.shape) if is_tensor else type(output).__name__
        raise TypeError(f"model: gave {found}, expected logits (..., classes) of several classes")
    logged: Tensor = logits.float().log_softmax(-1)
    return logged


def _distance(
    model: nn.Module, params: Mapping[str, Tensor], base: Iterable[tuple[Any, Tensor]]
) -> Tensor:
    """The mean divergence over the tokens of all batches, shape (K,)."""
    total, tokens = torch.zeros(()), 0.0
    for batch, expected in base:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is None or mask.shape != expected.shape[:-1]:
            mask = torch.ones(expected.shape[:-1], device=expected.device)
        summed = vcall(model, params, batch, loss_fn=_divergence(expected, mask), fallback="loop")
        total, tokens = total.to(summed) + summed, tokens + mask.sum().item()
    return total / tokens


def _divergence(expected: Tensor, mask: Tensor) -> Callable[[Any, Any], Tensor]:
    def divergence(output: Any, batch: Any) -> Tensor:
        found = _log_probabilities(output)
        each = expected.exp() * (expected - found)
        each = each.masked_fill(expected == -torch.inf, 0).sum(-1)
        return (each * mask.to(each)).sum()

    return divergence


def _solved(
    distance: Callable[[Tensor], Tensor], k: int, target: float, tol: float, most: float
) -> Tensor:
    """Bracket and bisection; a distance that is not finite is too far."""
    with tqdm(desc="strength", unit="call", disable=None) as bar:

        def is_far(strength: Tensor) -> tuple[Tensor, Tensor]:
            bar.update()
            found = distance(strength).double().cpu()
            return ~(found < target), (found - target).abs() <= tol * target

        low, high = _bracket(is_far, k, target, most)
        middle, (_, close) = high, is_far(high)
        for _ in range(_HALVINGS):
            if close.all():
                return middle
            middle = torch.where(close, middle, (low + high) / 2)
            far, close = is_far(middle)
            low, high = torch.where(far, low, middle), torch.where(far, middle, high)
    raise ValueError(
        f"target_kl: the distance jumps over {target} at a strength of {middle.tolist()}; ask for "
        "another distance, or a larger tol"
    )


def _bracket(
    is_far: Callable[[Tensor], tuple[Tensor, Tensor]], k: int, target: float, most: float
) -> tuple[Tensor, Tensor]:
    """Strengths below and above the distance, or at it."""
    low, high = torch.zeros(k, dtype=torch.float64), torch.ones(k, dtype=torch.float64)
    far, _ = is_far(low)
    if far.any():
        raise ValueError(
            f"target_kl: adapters {_places(far)} are farther than {target} at a strength of 0: a "
            "part of their change has no coefficient; ask for more than that"
        )
    while True:
        far, close = is_far(high)
        grows = ~(far | close)
        if not grows.any():
            return low, high
        if bool((high[grows] >= most).any()):
            raise ValueError(
                f"target_kl: adapters {_places(grows)} do not reach {target} with a strength of "
                f"{most:g}; they change nothing at their start, or too little; train them first, "
                "or ask for less"
            )
        low, high = torch.where(grows, high, low), torch.where(grows, 2 * high, high)


def _places(mask: Tensor) -> list[int]:
    found: list[int] = mask.nonzero().flatten().tolist()
    return found
