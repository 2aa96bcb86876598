"""LoRA-RITE: Adam in coordinates that do not depend on the split into factors."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_func.adapter import as_trainable
from lora_func.rules._leaves import Pair, check_one_kind, pairs_of, rates_of, wide
from lora_func.variant import Params


def lora_rite(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    state: Mapping[str, Tensor] | None = None,
    *,
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    clip: float = 1.0,
    skip: float = 1.0,
) -> tuple[Params, Params]:
    """Take one step of LoRA-RITE on every pair of factors.

    Each factor's gradient is expressed in the orthonormal basis of the other factor, where the
    moments are matrices r x r; old moments are projected from the old basis into the new one.

    References:
        https://arxiv.org/abs/2410.20625, alg. 1. Code: gkevinyen5418/LoRA-RITE.

    Args:
        params: An adapter, or a stack; it does not change.
        grads: Its gradients.
        state: What the step before returned; None at the first step.
        lr: The learning rate; for a stack possibly one for each adapter, shape (K,).
        betas: The decays of the first and the second moment.
        eps: What is added to the root of the second moment.
        clip: The largest norm of the gradients of all factors of one adapter together, in the
            orthonormal coordinates.
        skip: A gradient in these coordinates with a larger root mean square counts as zero; the
            moments still move the factor.

    Returns:
        (params, state): the adapter after the step, and its moments and bases.

    Raises:
        ValueError: If no site has factors, a factor has no gradient, lr is not positive, or some
            sites are stacked experts and others are not.
    """
    with torch.no_grad():
        pairs, before = pairs_of(params), state or {}
        check_one_kind({key: params[key] for pair in pairs for key in pair[:2]})
        found = {
            key: side for pair in pairs for key, side in _sides(pair, params, grads, skip).items()
        }
        sizes = [found[key][0].square().sum((-2, -1)) for key in found]
        total = torch.stack(sizes).sum(0).sqrt().clamp_min(torch.finfo(sizes[0].dtype).tiny)
        shrink = (clip / total).clamp_max(1)[..., None, None]
        t = before["step"] + 1 if state else torch.ones((), dtype=torch.float64)
        made, after = dict[str, Tensor](), {"step": t}
        for key, (u, basis, inverse) in found.items():
            names = ("m", "v", "basis")
            old = {name: before[f"{key}/{name}"] for name in names} if state else None
            m, v = _moments(u * shrink, basis, old, t, betas, eps)
            after |= {f"{key}/m": m, f"{key}/v": v, f"{key}/basis": basis}
            step = m @ inverse.mT
            moved = params[key] - rates_of(lr, step) * (step.mT if key.endswith(".A") else step)
            made[key] = moved.to(params[key].dtype)
    return {**params, **as_trainable(made)}, after


def _sides(
    pair: Pair, params: Mapping[str, Tensor], grads: Mapping[str, Tensor], skip: float
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """For each factor its gradient (..., d, r), in the other's basis, that basis, and R⁺."""
    for key in pair[:2]:
        if key not in grads:
            raise ValueError(f"{key}: has no gradient; LoRA-RITE moves both factors")
    A, B, _ = pair.factors(params)
    sides = {}
    for key, gradient, other in (
        (pair.A, wide(grads[pair.A]).mT, B),
        (pair.B, wide(grads[pair.B]), A.mT),
    ):
        basis, R = torch.linalg.qr(other)
        basis = basis * other.any(-2, keepdim=True)  # without the arbitrary part of padded ranks
        inverse = torch.linalg.pinv(R)
        u = gradient @ inverse
        is_large = u.square().mean((-2, -1), keepdim=True).sqrt() > skip
        sides[key] = (u.masked_fill(is_large, 0), basis, inverse)
    return sides


def _moments(
    u: Tensor,
    basis: Tensor,
    old: Mapping[str, Tensor] | None,
    t: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The first moment (..., d, r) and the second one (..., r, r)."""
    c1, c2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in betas)
    v = (1 - c2) * u.mT @ u / u.shape[-2]
    if old is not None:
        turn = basis.mT @ old["basis"]
        v = v + c2 * turn @ old["v"] @ turn.mT
    values, vectors = torch.linalg.eigh(v)
    m = (1 - c1) * u @ (vectors / (values.clamp_min(0).sqrt() + eps)[..., None, :] @ vectors.mT)
    return (m if old is None else m + c1 * old["m"] @ turn.mT), v
