"""LoRA-Muon: steps whose change of the weight has the same size in every direction."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_func.adapter import as_trainable
from lora_func.checks import check_number
from lora_func.rules._leaves import pairs_of, rates_of, wide
from lora_func.variant import Params

_FLOOR = 1e-5
"""What is added to a Gram matrix of norm 1 before its root is inverted."""


def lora_muon(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    state: Mapping[str, Tensor] | None = None,
    *,
    lr: float | Tensor = 0.1,
    beta: float = 0.9,
    decay: float = 0.0,
) -> tuple[Params, Params]:
    """Take one step of LoRA-Muon on every pair of factors.

    ``ΔB = -(η / 2s) msign(m_B R_A) R_A`` with ``R_A = (A Aᵀ)^-½``, and ΔA alike with
    ``R_B = (Bᵀ B)^-½``; m are running means of the gradients. ``s B ΔA`` and ``s ΔB A`` then have a
    spectral norm of η / 2. A factor that is zero has a root of zero, so that the other one waits.

    References:
        https://arxiv.org/abs/2606.12921, alg. 1 and appendix B.4. There is no code by the authors.

    Args:
        params: An adapter, or a stack; it does not change.
        grads: Its gradients.
        state: What the step before returned; None at the first step.
        lr: η; for a stack possibly one for each adapter, shape (K,).
        beta: The weight of the past in the running means.
        decay: Decoupled weight decay λ of the product ``B A``; λ η must stay below 1.

    Returns:
        (params, state): the adapter after the step, in which leaves outside of the pairs are the
        same tensors, and the running means.

    Raises:
        ValueError: If no site has factors, a setting is out of its range, or a factor has no
            gradient.
    """
    check_number("decay", decay)
    if decay and bool((decay * torch.as_tensor(lr) >= 1).any()):
        raise ValueError(f"decay: got {decay!r}; times lr = {lr!r} it must stay below 1")
    check_number("beta", beta)
    if not 0 <= beta < 1:
        raise ValueError(f"beta: got {beta!r}, expected at least 0 and below 1")
    made: Params = {}
    means: Params = {}
    with torch.no_grad():
        for pair in pairs_of(params):
            A, B, s = pair.factors(params)
            eta = rates_of(lr, A)
            for key in pair[:2]:
                if key not in grads:
                    raise ValueError(f"{key}: has no gradient; LoRA-Muon moves both factors")
                before = state[key] if state else 0.0
                means[key] = beta * before + (1 - beta) * wide(grads[key])
            root_A, root_B = _inverse_root(A @ A.mT), _inverse_root(B.mT @ B)
            step_A = root_B @ _msign(means[pair.A].mT @ root_B).mT
            step_B = _msign(means[pair.B] @ root_A) @ root_A
            kept = (1 - decay * eta).sqrt()
            for key, factor, step in ((pair.A, A, step_A), (pair.B, B, step_B)):
                made[key] = (kept * factor - eta / (2 * s) * step / kept).to(params[key].dtype)
    return {**params, **as_trainable(made)}, means


def _inverse_root(gram: Tensor) -> Tensor:
    """``G^-½`` of a Gram matrix (..., r, r) with a floor; zero for zero."""
    size = torch.linalg.matrix_norm(gram)[..., None, None]
    is_zero = size == 0
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    values, vectors = torch.linalg.eigh(gram / size.masked_fill(is_zero, 1) + _FLOOR * eye)
    root = vectors * values.clamp_min(_FLOOR).rsqrt()[..., None, :] @ vectors.mT
    inverse: Tensor = (root / size.masked_fill(is_zero, 1).sqrt()).masked_fill(is_zero, 0)
    return inverse


def _msign(X: Tensor) -> Tensor:
    """``U Vᵀ`` of the singular vectors of X (..., d, r), without those of singular value 0."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    smallest = torch.finfo(S.dtype).eps * max(X.shape[-2:]) * S[..., :1]
    sign: Tensor = U * (smallest < S)[..., None, :] @ Vh
    return sign
