"""The nearest LoRA of another adapter."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_func.adapter import Key, as_trainable
from lora_func.checks import check_count
from lora_func.modules import inner_model
from lora_func.numerics import DROPOUT, at_least_float32
from lora_func.runtime import (
    Site,
    check_single,
    dense_parameters,
    effective_parameters,
    layout_of,
    leaves_of,
)
from lora_func.variant import Params
from lora_func.variants import lora
from lora_func.weights import dense, is_linear, matrix


class AsLoRA(NamedTuple):
    """A LoRA in place of another adapter.

    Attributes:
        params: The adapter.
        errors: Site -> the part of the change of the weight that is missing, relative to its norm;
            zero for a change that is only rounding.
    """

    params: Params
    errors: dict[str, float]


def to_lora(
    params: Mapping[str, Tensor],
    model: nn.Module,
    rank: int,
    *,
    tol: float = 1e-3,
    trained: bool = False,
) -> AsLoRA:
    """Find the nearest LoRA of a rank to an adapter, by singular values.

    Parameters that are trained themselves (``Full``) stay as they are, unless ``trained`` is True.

    Args:
        params: The adapter.
        model: The model it belongs to.
        rank: The rank; at a site with a smaller matrix, its smaller side.
        tol: The largest accepted relative error at a site, in the Frobenius norm.
        trained: Whether trained weights of linear layers become LoRAs too.

    Returns:
        The LoRA, with a scale of 1, and the error at each site.

    Raises:
        KeyError: If a key names no module or parameter of the model, or no variant.
        TypeError: If a variant has no weight, or changes a bias, which a LoRA cannot.
        ValueError: If params is a stack, rank is below 1, or an error is above tol.

    Examples:
        >>> import torch, lora_func as lf
        >>> model = torch.nn.Linear(4, 4)
        >>> found = lf.to_lora(lf.init(model, lf.HRA(r=2)), model, rank=2)
        >>> list(found.params)
        ['.lora.A', '.lora.B', '.lora._scale']
    """
    check_count("rank", rank)
    model = inner_model(model)
    check_single(params, model)
    found, errors = Params(), dict[str, float]()
    for site in layout_of(model, params).sites:
        replaces = site.variant.parameters is not None
        if replaces and not (trained and "weight" in site.keys and is_linear(site.module)):
            found |= {key: params[key].detach().clone() for key in site.keys.values()}
            continue
        with torch.no_grad():
            leaves, errors[site.path] = _nearest(site, params, rank)
        if DROPOUT in site.keys:
            leaves[DROPOUT] = params[site.keys[DROPOUT]].detach().clone()
        found |= {
            str(Key(site.path, lora.VARIANT.name, name)): leaf for name, leaf in leaves.items()
        }
    worst = max(errors, key=errors.__getitem__, default="")
    if errors and not errors[worst] <= tol:
        raise ValueError(
            f"{worst}: a LoRA of rank {rank} misses {errors[worst]:.2e} of the change, more than "
            f"tol = {tol:g}; raise the rank or tol"
        )
    return AsLoRA(as_trainable(found), errors)


def _nearest(
    site: Site, params: Mapping[str, Tensor], rank: int
) -> tuple[dict[str, Tensor], float]:
    module, name = site.module, site.parameter or "weight"
    own = dense_parameters(site)
    own[name] = at_least_float32(own[name])
    before = matrix(module, own, name)
    changed = effective_parameters(site, own, leaves_of(site, params))
    after = matrix(module, {**own, **changed}, name)
    if not _same(after.bias, before.bias):
        raise TypeError(f"{site.path}: {site.variant.name} changes the bias, which a LoRA cannot")
    U, S, Vh = torch.linalg.svd((dense(after) - dense(before)).double(), full_matrices=False)
    rounding = 16 * torch.finfo(own[name].dtype).eps * own[name].norm()
    missed = S[..., rank:].norm() / S.norm() if S.norm() > rounding else S.new_zeros(())
    root = S[..., :rank].sqrt()
    A = (root[..., None] * Vh[..., :rank, :]).to(own[name].dtype)
    B = (U[..., :rank] * root[..., None, :]).to(own[name].dtype)
    return lora.from_factors(A, B), missed.item()


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one.to(other.dtype), other)
